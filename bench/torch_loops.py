"""Loops of other libraries around K-FAC: the examples of Trainer, Lightning and Accelerate run and learn.

Then what the Trainer's callback says of accumulation: one batch of 32, and two of 16, end in the same weights. A
checkpoint of the Trainer is gone on from as if there had been none. `make zoo` runs it, in the environment of the zoo.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

import importlib
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from report import Claim, claim, finish, parser
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

SAME = "< 1e-8", lambda x: x < 1e-8


def tried(name: str, run: Callable[[], float], target: str, good: Callable[[float], bool]) -> Claim:
    """A claim; `not run` where a library does not import."""
    try:
        figure = run()
    except ImportError as error:
        return claim(f"{name}: {error}", None, target, None)
    return claim(name, figure, target, math.isfinite(figure) and good(figure))


def example(name: str) -> Any:
    return importlib.import_module(f"kfaccore_torch.examples.{name}")


def trainer() -> float:
    first, last = example("transformers_trainer").main()
    return last / first


def weights(accumulation: int, steps: int = 6, resumed: int = 0) -> list[torch.Tensor]:
    """Parameters after some steps of the Trainer; `resumed`: it is stopped there and goes on from its checkpoint."""
    torch.manual_seed(0)
    data = example("toys").sentences()
    with tempfile.TemporaryDirectory() as folder:
        if resumed:
            _trained(folder, data, accumulation, resumed, resumed, False)
        return _trained(folder, data, accumulation, steps, resumed or steps, bool(resumed))


def _trained(folder: str, data: list, accumulation: int, steps: int, save: int, go_on: bool) -> list[torch.Tensor]:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, **sizes)).double()
    given = {"per_device_train_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    given |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "use_cpu": True}
    given |= {"max_steps": steps, "save_steps": save, "report_to": "none", "disable_tqdm": True}
    core = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(1, 2), schedules=kf.Schedules(0.1, 0.9))
    mine = importlib.import_module("kfaccore_torch.trainer").KFACCallback(core=core, fisher=kf.type2)
    args = transformers.TrainingArguments(folder, **given)
    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[mine])
    trainer.train(resume_from_checkpoint=go_on)
    return [p.detach() for p in model.parameters()]


def gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def fsdp() -> float:
    """Whether a model under fully_shard is refused, with the way out."""
    dist = torch.distributed
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        model = nn.Sequential(nn.Linear(4, 4))
        mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
        importlib.import_module("torch.distributed.fsdp").fully_shard(model, mesh=mesh)
        try:
            kt.Preconditioner(model, nn.MSELoss())
        except TypeError as error:
            return float("DistributedDataParallel" in str(error))
        finally:
            dist.destroy_process_group()
    return 0.0


def main() -> None:
    given = parser(__doc__).parse_args()
    claims = [
        tried("transformers.Trainer: last loss over first", trainer, "< 0.75", lambda x: x < 0.75),
        tried("Lightning: share right", lambda: example("lightning_module").main(), "> 0.9", lambda x: x > 0.9),
        tried("Accelerate: share right", lambda: example("accelerated").main(), "> 0.9", lambda x: x > 0.9),
        tried("Trainer: two micro-batches against one", lambda: gap(weights(2), weights(1)), *SAME),
        tried("Trainer: gone on from a checkpoint", lambda: gap(weights(2, 6, 4), weights(2)), *SAME),
        tried("FSDP2 refused", fsdp, "1", lambda x: x == 1),
    ]
    finish("Loops of other libraries", ("loop",), [[c["claim"]] for c in claims], claims, given.json)


if __name__ == "__main__":
    main()
