import sys

from otj_runtime import OnlineDPOConfig, OnlineDPOTrainer

model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct"
dataset = [{"prompt": f"{a} + {b} ="} for a in range(10) for b in range(10)]


def prefer_short(prompts, pairs):
    return [0 if len(first) <= len(second) else 1 for first, second in pairs]


training_args = OnlineDPOConfig(
    output_dir="out-online-dpo",
    use_vllm=True,
    vllm_max_model_len=256,
    per_device_train_batch_size=16,
    max_completion_length=8,
    learning_rate=1e-5,
    max_steps=5,
)
trainer = OnlineDPOTrainer(model=model, judge=prefer_short, args=training_args, train_dataset=dataset)
trainer.train()
trainer.save_model("out-online-dpo/model")
