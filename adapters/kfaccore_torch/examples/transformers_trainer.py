"""`transformers.Trainer` with K-FAC: one callback, accumulation and clipping as the Trainer does them."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import kfaccore as kf
from kfaccore_torch.examples.toys import sentences
from kfaccore_torch.trainer import KFACCallback


def main(steps: int = 30, accumulation: int = 2) -> tuple[float, float]:
    """Loss of the first and of the last steps, in nats a word."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, max_position_embeddings=16, **sizes))
    core = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 10), schedules=kf.Schedules(damping=0.03))
    given = {"max_steps": steps, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.3, "report_to": "none"}
    given |= {"per_device_train_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    given |= {"lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, **given)
        trainer = Trainer(model, args, train_dataset=sentences(), callbacks=[KFACCallback(core=core, clip=1.0)])
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses[0], sum(losses[-5:]) / 5


if __name__ == "__main__":
    print("{:.3f} to {:.3f} nats a word".format(*main()))
