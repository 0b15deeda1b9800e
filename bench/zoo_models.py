"""Public models, small and with random weights, each with one batch, a loss, and the losses of its examples."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CLASSES, VOCABULARY = 5, 24


class Picked(nn.Module):
    """A model whose output is an object: the tensor that the loss is of."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.pick(self.model(**inputs))


@dataclass
class Entry:
    """One model and its batch.

    skip   patterns left uncovered, as the library's own errors and reports say to
    """

    model: nn.Module
    inputs: Any
    target: torch.Tensor
    loss: Any
    examples: int
    skip: tuple[str, ...] = ()

    def predict(self) -> torch.Tensor:
        given, named = self.arguments
        return self.model(*given, **named)

    @property
    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """What the model is called with."""
        if isinstance(self.inputs, dict):
            return (), self.inputs
        return (self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)), {}

    def value(self, f: torch.Tensor) -> torch.Tensor:
        return self.loss(f, self.target)

    @property
    def n(self) -> float:
        if isinstance(self.loss, nn.MSELoss):
            return float(self.target.numel())
        return float((self.target != -100).sum())

    def each(self, f: torch.Tensor) -> torch.Tensor:
        """Losses of the examples, summed over their positions."""
        if isinstance(self.loss, nn.MSELoss):
            return ((f - self.target) ** 2).reshape(self.examples, -1).sum(1)
        return nn.functional.cross_entropy(f, self.target, reduction="none").reshape(self.examples, -1).sum(1)


def of(path: str) -> Any:
    """`package.module:name`, imported when it is asked for."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def images(model: nn.Module, size: int = 16, batch: int = 4, skip: tuple[str, ...] = ()) -> Entry:
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
    return Entry(model.double().eval(), x, y, nn.CrossEntropyLoss(), batch, skip)


def language(name: str, labels: str = "shifted", skip: tuple[str, ...] = (), **more: Any) -> Callable[[], Entry]:
    """A language model of transformers on ids; `labels`: shifted and flattened, or one a sequence."""

    def make() -> Entry:
        config, kind = (of(f"transformers:{part}") for part in name.split(" "))
        given = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}
        model = kind(config(**given))
        ids = torch.randint(3, VOCABULARY, (3, 6))
        if labels == "shifted":
            target = ids[:, 1:].reshape(-1)
            picked = Picked(model, lambda out: out.logits[:, :-1].reshape(-1, out.logits.shape[-1]))
        elif labels == "classes second":
            target = ids[:, 1:]
            picked = Picked(model, lambda out: out.logits[:, :-1].transpose(1, 2))
        elif labels == "tokens":
            target = ids.reshape(-1)
            picked = Picked(model, lambda out: out.logits.reshape(-1, out.logits.shape[-1]))
        else:
            target = torch.randint(0, CLASSES, (3,))
            picked = Picked(model, lambda out: out.logits)
        inputs = {"input_ids": ids}
        if "T5" in name:
            inputs["decoder_input_ids"] = ids[:, :4]
            target = ids[:, :4].reshape(-1)
        return Entry(picked.double().eval(), inputs, target, nn.CrossEntropyLoss(), 3, skip)

    return make


BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 8, "num_labels": CLASSES}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA |= {"num_key_value_heads": 1, "max_position_embeddings": 16}


def vit() -> Entry:
    kind = of("torchvision.models.vision_transformer:VisionTransformer")
    model = kind(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # its zeros would hide every other layer
    return images(model)


def swin(version: int) -> Callable[[], Entry]:
    def make() -> Entry:
        room = "torchvision.models.swin_transformer"
        more: dict[str, Any] = {}
        if version == 2:
            more = {"block": of(f"{room}:SwinTransformerBlockV2"), "downsample_layer": of(f"{room}:PatchMergingV2")}
        model = of(f"{room}:SwinTransformer")(
            [2, 2], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=CLASSES, **more
        )
        nn.init.normal_(model.head.weight, std=0.3)
        return images(model)

    return make


def convnext() -> Entry:
    room = "torchvision.models.convnext"
    block = of(f"{room}:CNBlockConfig")
    model = of(f"{room}:ConvNeXt")([block(8, 16, 1), block(16, None, 1)], num_classes=CLASSES, layer_scale=1.0)
    return images(model)


def densenet() -> Entry:
    return images(of("torchvision.models:DenseNet")(4, (2, 2), 8, num_classes=CLASSES), 32)


def mobilenet() -> Entry:
    setting = [[1, 8, 1, 1], [2, 12, 1, 2], [2, 16, 1, 1]]
    model = of("torchvision.models:MobileNetV2")(CLASSES, 0.5, setting, dropout=0.0)
    return images(model)


def resnet(training: bool) -> Callable[[], Entry]:
    def make() -> Entry:
        room = "timm.models.resnet"
        kind, block = of(f"{room}:ResNet"), of(f"{room}:BasicBlock")
        entry = images(kind(block, (1, 1, 1, 1), num_classes=CLASSES, channels=(8, 8, 8, 8), stem_width=8), 16)
        if training:
            entry.model.train()
            for module in entry.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0
        return entry

    return make


def timm_vit() -> Entry:
    kind = of("timm.models.vision_transformer:VisionTransformer")
    model = kind(16, 8, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2)
    nn.init.normal_(model.head.weight, std=0.3)
    return images(model)


def mixer() -> Entry:
    kind = of("timm.models.mlp_mixer:MlpMixer")
    model = kind(CLASSES, img_size=16, patch_size=8, num_blocks=2, embed_dim=16)
    nn.init.normal_(model.head.weight, std=0.3)
    return images(model)


def convmixer() -> Entry:
    return images(of("timm.models.convmixer:ConvMixer")(8, 2, kernel_size=3, patch_size=4, num_classes=CLASSES))


def graphs(layer: str, **more: Any) -> Callable[[], Entry]:
    """Graphs of several sizes in one batch, pooled."""

    def make() -> Entry:
        conv, pool = of(f"torch_geometric.nn:{layer}"), of("torch_geometric.nn:global_mean_pool")

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                if layer == "GINConv":
                    self.a, self.b = (conv(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(2))
                else:
                    self.a, self.b = conv(6, 6, **more), conv(6, 6, **more)
                self.o = nn.Linear(6, CLASSES)

            def forward(self, x: torch.Tensor, edge: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
                h = torch.tanh(self.b(torch.tanh(self.a(x, edge)), edge))
                return self.o(pool(h, batch))

        edge = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 6, 7], [1, 0, 2, 1, 4, 3, 6, 7, 8]])
        batch = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
        y = torch.randint(0, CLASSES, (3,))
        return Entry(Net().double(), (torch.randn(9, 6), edge, batch), y, nn.CrossEntropyLoss(), 3)

    return make


def text() -> Entry:
    """An LSTM that classifies sequences of tokens."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(VOCABULARY, 8), nn.Linear(12, CLASSES)
            self.r = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.o(self.r(self.e(ids))[0].mean(1))

    ids = torch.randint(0, VOCABULARY, (3, 6))
    return Entry(Net().double(), ids, torch.randint(0, CLASSES, (3,)), nn.CrossEntropyLoss(), 3)


def recommender() -> Entry:
    """Bags of categories beside numbers, and their products, as recommenders have them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.ModuleList(nn.EmbeddingBag(VOCABULARY, 4, mode="sum") for _ in range(3))
            self.bottom = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
            self.top = nn.Sequential(nn.Linear(4 + 6, 8), nn.ReLU(), nn.Linear(8, CLASSES))

        def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
            z = self.bottom(numbers)
            rows = torch.stack([z, *(bag(categories[:, i]) for i, bag in enumerate(self.bags))], 1)
            products = (rows @ rows.mT)[:, *torch.tril_indices(4, 4, -1)]
            return self.top(torch.cat([z, products], 1))

    inputs = torch.randn(4, 5), torch.randint(0, VOCABULARY, (4, 3, 2))
    return Entry(Net().double(), inputs, torch.randint(0, CLASSES, (4,)), nn.CrossEntropyLoss(), 4)


def lora() -> Entry:
    peft = importlib.import_module("peft")
    entry = language("LlamaConfig LlamaForCausalLM", **LLAMA)()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    entry.model.model = peft.get_peft_model(entry.model.model, config).double()
    return entry


def unet() -> Entry:
    kind = of("diffusers:UNet2DModel")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4}
    model = kind(sample_size=4, in_channels=1, out_channels=1, **blocks, **sizes)
    inputs = {"sample": torch.randn(2, 1, 4, 4), "timestep": torch.tensor([3, 11])}
    target = torch.randn(2, 1, 4, 4)
    return Entry(Picked(model, lambda out: out.sample).double(), inputs, target, nn.MSELoss(), 2)


def lightning() -> Entry:
    module = importlib.import_module("lightning").LightningModule

    class Net(module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten())
            self.head = nn.LazyLinear(CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x))

    model = Net()
    model(torch.randn(1, 3, 6, 6))
    return images(model, 6)


def accelerated() -> Entry:
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    entry = mobilenet()
    entry.model = accelerator.prepare(entry.model)
    return entry


def gpt2_whole() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 of 124 million numbers, on the meta device."""
    with torch.device("meta"):
        model = of("transformers:GPT2LMHeadModel")(of("transformers:GPT2Config")())
        return model, {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}


def llama_whole() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama of 1.2 billion numbers, on the meta device."""
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = of("transformers:LlamaForCausalLM")(of("transformers:LlamaConfig")(**sizes, **heads))
        return model, {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}


WHOLE = {"GPT-2 124M": gpt2_whole, "Llama 1B": llama_whole}  # planned, never run

ZOO: dict[str, Callable[[], Entry]] = {
    "torchvision ViT": vit,
    "torchvision Swin": swin(1),
    "torchvision Swin v2": swin(2),
    "torchvision ConvNeXt": convnext,
    "torchvision DenseNet": densenet,
    "torchvision MobileNetV2": mobilenet,
    "timm ResNet": resnet(False),
    "timm ResNet, batch statistics": resnet(True),
    "timm ViT": timm_vit,
    "timm Mixer": mixer,
    "timm ConvMixer": convmixer,
    "BERT": language("BertConfig BertForSequenceClassification", "one", **BERT),
    "BERT, masked words": language("BertConfig BertForMaskedLM", "tokens", **BERT),
    "RoBERTa": language("RobertaConfig RobertaForTokenClassification", "tokens", **{**BERT, "num_labels": VOCABULARY}),
    "DistilBERT": language(
        "DistilBertConfig DistilBertForSequenceClassification",
        "one",
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=8,
        num_labels=CLASSES,
    ),
    "GPT-2": language("GPT2Config GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=8),
    "GPT-2, own head": language(
        "GPT2Config GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=8, tie_word_embeddings=False
    ),
    "Llama, shifted": language("LlamaConfig LlamaForCausalLM", **LLAMA),
    "Llama, tied": language("LlamaConfig LlamaForCausalLM", **LLAMA, tie_word_embeddings=True),
    "Mistral": language("MistralConfig MistralForCausalLM", **LLAMA),
    "Qwen2": language("Qwen2Config Qwen2ForCausalLM", **LLAMA),
    "Mixtral": language(
        "MixtralConfig MixtralForCausalLM",
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="eager",  # the others know no float64
        **LLAMA,
    ),
    "OPT": language(
        "OPTConfig OPTForCausalLM",
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=8,
        word_embed_proj_dim=16,
    ),
    "T5": language(
        "T5Config T5ForConditionalGeneration",
        "tokens",
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    ),
    "Llama with LoRA": lora,
    "GCN on graphs": graphs("GCNConv"),
    "SAGE on graphs": graphs("SAGEConv"),
    "GIN on graphs": graphs("GINConv"),
    "GAT on graphs": graphs("GATConv", heads=2, concat=False),
    "diffusers UNet": unet,
    "LSTM on text": text,
    "DLRM-like": recommender,
    "Lightning module": lightning,
    "Accelerate, prepared": accelerated,
}
