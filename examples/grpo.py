import sys

from otj_runtime import GRPOConfig, GRPOTrainer

model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct"
dataset = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10) for b in range(10)]


def right_answer(completions, answer, **kwargs):
    return [float(text.split()[:1] == [right]) for text, right in zip(completions, answer, strict=True)]


training_args = GRPOConfig(
    output_dir="out-grpo",
    use_vllm=True,
    vllm_max_model_len=256,
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=8,
    learning_rate=1e-5,
    max_steps=5,
)
trainer = GRPOTrainer(model=model, reward_funcs=right_answer, args=training_args, train_dataset=dataset)
trainer.train()
trainer.save_model("out-grpo/model")
