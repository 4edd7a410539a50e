"""GRPO with TRL, as a TRL user writes it: nothing in here knows of the pod that it runs in.

    accelerate launch examples/trl_grpo.py --model PATH         beside a `vllm serve` of one's own, as TRL's documentation describes
    otj run manifests/samples/trl-script.yaml --volume scripts=examples

The model learns to repeat four symbols: "abcd=" -> "abcd".
"""

import argparse
import random

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def share_of_right_symbols(completions, answer, **columns):
    """Between 0 and 1 for each completion."""
    return [sum(a == b for a, b in zip(text, right)) / len(right) for text, right in zip(completions, answer)]  # noqa: B905


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    options = parser.parse_args()

    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(2048)]
    dataset = Dataset.from_list([{"prompt": f"{text}=", "answer": text} for text in texts])

    training_args = GRPOConfig(
        output_dir="trl",
        use_vllm=True,
        vllm_mode="server",
        max_steps=options.max_steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=96,
        num_generations=16,
        max_completion_length=4,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(model=options.model, reward_funcs=share_of_right_symbols, args=training_args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
