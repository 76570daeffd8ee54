"""Lightning training of the demo models: byte windows in, a trained Llama out."""

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_upcycle.demo.recipe import BASE, MODELS, Recipe
from fusion_upcycle.demo.texts import DOMAINS, domain_text
from fusion_upcycle.demo.tokenizer import VOCABULARY_SIZE, byte_tokenizer


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """Untrained base model; the same weights for the same recipe."""
    end_of_text = VOCABULARY_SIZE - 1
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context_length,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, name: str, recipe: Recipe) -> None:
    """Train ``model`` in place: as the base on the mix of domains, else on the domain ``name``."""
    steps, share = (
        (recipe.base_steps, 1.0) if name == BASE else (recipe.finetune_steps, recipe.finetune_share)
    )
    with _quiet_lightning(), tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",  # the same models on every machine, and tiny ones gain little
            devices=1,
            max_steps=2 * steps,  # Lightning counts the steps of each optimizer
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[TQDMProgressBar(refresh_rate=10)],
        )
        trainer.fit(
            _LanguageModel(model, recipe, steps, share),
            train_dataloaders=_batches(name, recipe, steps),
        )
    model.eval()


class _LanguageModel(L.LightningModule):
    """Muon for the matrices of the layers, AdamW for the rest.

    In the little time that these models have, Muon gets far lower than AdamW alone (prose, same
    cost: about 2.0 against 2.5 bits per byte).
    """

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe, steps: int, share: float) -> None:
        super().__init__()
        self.model = model.train()
        self.recipe = recipe
        self.steps = steps
        self.share = share  # of the recipe's learning rates
        self.automatic_optimization = False  # Lightning's own loop takes one optimizer

    def training_step(self, ids_BT: Tensor) -> None:
        logits_BTV = self.model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        self.log("bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        self.manual_backward(loss)
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()

    def configure_optimizers(self) -> list[Optimizer]:
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        optimizers: list[Optimizer] = [
            Muon(matrices, lr=self.share * self.recipe.matrix_learning_rate, weight_decay=0.0),
            AdamW(
                others,
                lr=self.share * self.recipe.other_learning_rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        ]
        warmup = max(1, int(self.recipe.warmup_share * self.steps))

        def factor(step: int) -> float:
            done = max(0, step - warmup) / max(1, self.steps - warmup)
            return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

        self.schedules = [LambdaLR(optimizer, factor) for optimizer in optimizers]
        return optimizers


def _batches(name: str, recipe: Recipe, steps: int) -> Tensor:
    """Random windows [steps, batch, context + 1] of the domain's packed training documents."""
    domains = DOMAINS if name == BASE else (name,)
    weights = torch.tensor(recipe.base_mix if name == BASE else (1.0,))
    streams = [_stream(domain, recipe.context_length) for domain in domains]
    # The model's place in the list keeps base and fine-tunes from drawing the same windows.
    generator = torch.Generator().manual_seed(recipe.seed * len(MODELS) + MODELS.index(name))
    count, length = steps * recipe.batch_size, recipe.context_length + 1
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    places = torch.rand(count, generator=generator, dtype=torch.float64)
    windows = []
    for domain, place in zip(chosen.tolist(), places.tolist(), strict=True):
        start = int(place * (len(streams[domain]) - length + 1))
        windows.append(streams[domain][start : start + length])
    return torch.stack(windows).view(steps, recipe.batch_size, length)


@cache
def _stream(domain: str, context_length: int) -> Tensor:
    tokenizer = byte_tokenizer(context_length)
    ids: list[int] = []
    for document in domain_text(domain, "train"):
        ids.append(tokenizer.bos_token_id)
        ids += tokenizer(document, split_special_tokens=True, verbose=False)["input_ids"]
    return torch.tensor(ids)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's device report and advice say nothing about this fixed recipe."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
