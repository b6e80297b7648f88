"""Train the small Mixture-of-Experts model that ships in moeplug/demo, on the text of CPython itself.

    python examples/train_demo.py --out demo                            # train and save, minutes on one GPU
    python examples/train_demo.py --check-quantization moeplug/demo     # what 8 and 4 bits do to it, on a CPU

The result is a Qwen3-MoE checkpoint as the family has it on disk (`DIR/checkpoint`) and the text it was scored on
(`DIR/heldout.txt`). The text is under one licence and on most Python developers' disks, so that whoever doubts a
number of the demo can make the model again.
"""

import argparse
import gzip
import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

END = "<|endoftext|>"
CONTEXT = 1024  # tokens, in training and in scoring
VOCABULARY = 2048  # 3.2 bytes per token on this text; embedding and output share a tenth of all weights
BALANCE_WEIGHT = 0.01
PROMPTS = ("The :mod:`", "Return a new ", "def __init__(self", ".. versionchanged:: 3.")

# Tables (encodings, entities), one machine's paths (_sysconfigdata), and a second copy of the reference manual
# (pydoc_data), which would put held-out pages into the training text.
SKIPPED_PARTS = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
SKIPPED_FILES = ("entities.py", "_sysconfigdata")
TEST_PARTS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
    name: str  # path below the corpus folder, so that the held-out choice is the same on every machine
    text: str

    @property
    def is_prose(self) -> bool:
        return self.name.endswith(".rst")

    @property
    def may_be_held_out(self) -> bool:
        return 2_000 <= len(self.text) <= 12_000 and not TEST_PARTS.intersection(Path(self.name).parts)


def default_corpus() -> list[Path]:
    """The running Python's standard library, and what Debian's python3, -doc and -examples packages put beside it."""
    found = [Path(sysconfig.get_path("stdlib"))]
    for name in ("html/_sources", "examples", "NEWS.gz", "HISTORY.gz"):
        found += sorted(Path("/usr/share/doc").glob(f"python3.*/{name}"))[-1:]
    return found


def read_corpus(paths: Iterable[Path]) -> list[Document]:
    """Every .py and .rst file below the folders and every file named, once per content, in the order of names."""
    documents: dict[str, Document] = {}
    for root in paths:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if is_wanted(p.relative_to(root)))
        for file in files:
            name = file.name if file == root else file.relative_to(root).as_posix().removesuffix(".txt")
            if text := read_text(file):
                documents.setdefault(text, Document(name, text))
    return sorted(documents.values())


def is_wanted(path: Path) -> bool:
    skipped = SKIPPED_PARTS.intersection(path.parts) or path.name.startswith(SKIPPED_FILES)
    return path.name.endswith((".py", ".rst", ".rst.txt")) and not skipped


def read_text(file: Path) -> str:
    """The file's text, or "" where it is not UTF-8 or where letters are under half of it: a table."""
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode().replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError):
        return ""
    printed = "".join(text.split())
    return text if sum(map(str.isalpha, printed)) > len(printed) / 2 else ""


def split_heldout(documents: list[Document], n_chars: int) -> tuple[list[str], str]:
    """Return (training texts, held-out text): whole files by hash of name, half of it prose and half code.

    A training text loses every paragraph that stands in the held-out text too (licence notes, repeated examples).
    """
    ranked = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    heldout: list[Document] = []
    for is_prose in (True, False):
        left = n_chars // 2
        for document in ranked:
            if document.is_prose == is_prose and document.may_be_held_out and len(document.text) <= left:
                heldout.append(document)
                left -= len(document.text)
    print("held out:", *(d.name for d in heldout))
    names = {d.name for d in heldout}  # another version of a held-out file would give it away as well
    seen = {key for d in heldout for p in d.text.split("\n\n") if len(key := " ".join(p.split())) >= 40}
    training = [without_paragraphs(d.text, seen) for d in documents if d.name not in names]
    return [text for text in training if text], "\n\n".join(d.text.strip() for d in heldout) + "\n"


def without_paragraphs(text: str, unwanted: set[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if " ".join(p.split()) not in unwanted)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: no text is out of vocabulary, and decode(encode(text)) == text, which bits per byte needs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of token ids, each text ended by END. int32, (tokens,)."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return torch.cat([torch.tensor([*e.ids, tokenizer.eos_token_id], dtype=torch.int32) for e in encodings])


def build_model(family: str, eos: int, device: str) -> PreTrainedModel:
    """The demo's Qwen3-MoE or the smaller OLMoE, in bfloat16. H and I are multiples of 128, for groups of 128."""
    common = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
        "router_aux_loss_coef": BALANCE_WEIGHT,
        "eos_token_id": eos,
    }
    config = {"qwen3_moe": demo_config, "olmoe": olmoe_config}[family](**common)
    # grouped_mm takes bfloat16 weights only; the optimizer below holds the float32 ones
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=eos)
    return model.to(device)


def demo_config(**common: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **common,
        hidden_size=256,
        intermediate_size=1024,  # of dense layers: there is none
        moe_intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )


def olmoe_config(**common: Any) -> OlmoeConfig:
    """More and smaller experts, and router weights that do not sum to one: minutes of a CPU, not of a GPU."""
    return OlmoeConfig(
        **common,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        pad_token_id=None,
        bos_token_id=None,
    )


def add_dropout(model: PreTrainedModel, p: float) -> None:
    """Drop values of what attention and experts add to the residual; hooks, so that the saved model stays Qwen3-MoE.

    300 s of an H100 are 48 passes over the text. Without, the model learns it by heart (numbers in docs/demo.md).
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))
        layer.mlp.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))


def losses(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy in nats per token, balance loss: 1.0 where every expert gets the same share).

    transformers' own balance loss sums over the layers first, so that two layers may cancel; this one is per layer.
    """
    out = model.model(inputs, output_router_logits=True, use_cache=False)
    logits = model.lm_head(out.last_hidden_state).float()
    balance = logits.new_zeros(())
    for router_logits in out.router_logits:
        share = chosen_share(router_logits, model.config.num_experts_per_tok)
        balance += len(share) * (share * router_logits.float().softmax(-1).mean(0)).sum()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), balance / len(out.router_logits)


def chosen_share(router_logits: Tensor, top_k: int) -> Tensor:
    """Return (E,): the share of all (token, choice) pairs that each expert gets. router_logits: (M, E)."""
    chosen = F.one_hot(router_logits.topk(top_k).indices, router_logits.shape[-1])
    return chosen.float().mean((0, 1))


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for embedding, routers and norms; float32 masters of all.

    One learning rate serves both: Muon's step is scaled to AdamW's usual root mean square of 0.2 per weight.
    """

    def __init__(self, model: PreTrainedModel, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        others: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            is_matrix = name.endswith(("_proj", "_proj.weight"))
            (by_shape.setdefault(p.shape, []) if is_matrix else others).append(p)
        # equal shapes are stacked: one batched product instead of one launch per matrix
        self.matrices = [(ps, stacked(ps), torch.zeros_like(stacked(ps))) for ps in by_shape.values()]
        self.others = [(p, p.detach().float()) for p in others]
        groups = [
            {"params": [m for _, m in self.others if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for _, m in self.others if m.ndim == 1], "weight_decay": 0.0},  # norms stay near 1
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for p, master in self.others:
            master.grad = p.grad.float()
        self.adamw.step()
        for p, master in self.others:
            p.copy_(master)
        for ps, master, momentum in self.matrices:
            grad = torch.stack([p.grad for p in ps]).float()
            momentum.lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(momentum, 0.95))
            master.mul_(1 - lr * self.weight_decay)
            master.add_(update, alpha=-lr * 0.2 * math.sqrt(max(master.shape[-2:])))
            torch._foreach_copy_(ps, list(master.unbind()))


def stacked(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([p.detach().float() for p in parameters])


def orthogonal(g: Tensor) -> Tensor:
    """Return the matrices of g, (..., N, K), with their singular values moved close to 1 (0.7 to 1.2).

    Five Newton-Schulz steps with the quintic of Muon; bfloat16 is enough, since the result is a direction.
    """
    x = g.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


def batches(tokens: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), (rows, CONTEXT) each: all windows in random order, cut elsewhere on every pass."""
    span = torch.arange(CONTEXT + 1, device=tokens.device)
    while True:
        cut = int(torch.randint(CONTEXT, ()))
        starts = cut + CONTEXT * torch.randperm((len(tokens) - 1 - cut) // CONTEXT)
        for chosen in starts[: len(starts) // rows * rows].to(tokens.device).split(rows):
            window = tokens[chosen[:, None] + span].long()
            yield window[:, :-1], window[:, 1:]


def learning_rate(peak: float, progress: float) -> float:
    """Up over the first 3 % of the time, then down in a straight line to zero at its end."""
    return peak * min(progress / 0.03, (1 - progress) / 0.97)


def train(model: PreTrainedModel, tokens: Tensor, args: argparse.Namespace, score: Callable[[], "Score"]) -> None:
    """Train until the clock says stop; the schedule follows the clock too, so a slow machine ends at zero as well."""
    optimizer = Optimizer(model, args.weight_decay)
    add_dropout(model, args.dropout)
    step_losses = torch.compile(losses, dynamic=False) if args.compile else losses
    limit = 60 * args.minutes
    start, next_report = math.inf, 0.0
    for step, (inputs, targets) in enumerate(batches(tokens, args.rows)):
        if step == 3:  # compilation and the first allocations are not training
            start = time.perf_counter()
        elapsed = max(time.perf_counter() - start, 0.0)
        if elapsed >= limit:
            break
        model.train()
        nats, balance = step_losses(model, inputs, targets)
        (nats + BALANCE_WEIGHT * balance).backward()
        optimizer.step(learning_rate(args.lr, max(elapsed / limit, 1e-3)))
        model.zero_grad(set_to_none=True)
        if step % 10 == 0:
            nats.item()  # the clock must not run ahead of the GPU's queue
        if elapsed >= next_report:
            next_report += limit / 12
            n_seen = (step + 1) * inputs.numel()
            print(
                f"{elapsed:6.1f} s  step {step:6d}  passes {n_seen / len(tokens):5.1f}"
                f"  train {nats.item():.3f} nats  balance {balance.item():.3f}  held-out {score()}",
                flush=True,
            )


class Score(NamedTuple):
    bits_per_byte: float
    perplexity: float  # per token
    shares: Tensor  # (layers, E): the share of tokens of each expert, in percent

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.4f} bits/byte, perplexity {self.perplexity:.3f}"


@torch.no_grad()
def score_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> Score:
    """Score every token of the text once, in windows of CONTEXT that do not overlap; END stands before the first."""
    model.eval()
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text, verbose=False).input_ids], device=model.device)
    nats, shares = 0.0, torch.zeros(())
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[None, start : start + CONTEXT + 1]
        out = model.model(window[:, :-1], output_router_logits=True, use_cache=False)
        logits = model.lm_head(out.last_hidden_state).float()
        nats += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        chosen = [chosen_share(r, model.config.num_experts_per_tok) for r in out.router_logits]
        shares = shares + torch.stack(chosen).cpu() * (window.numel() - 1)
    n_tokens = len(ids) - 1
    return Score(nats / math.log(2) / len(text.encode()), math.exp(nats / n_tokens), 100 * shares / n_tokens)


def rounded(w: Tensor, largest: int, group: int) -> Tensor:
    """Return w, (..., K), as integers up to `largest` times a float32 scale, amax / largest, per group of weights."""
    groups = w.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    return ((groups / scale).round() * scale).flatten(-2)


@torch.no_grad()
def check_quantization(folder: Path) -> None:
    """Print what plain rounding of all expert weights does to the held-out perplexity, everything else in float32."""
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    before = None
    for label, largest, group in (("as saved", 0, 0), ("int8, per row", 127, 0), ("4 bits, groups of 128", 7, 128)):
        model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
        for layer in model.model.layers if largest else ():
            for w in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                w.copy_(rounded(w, largest, group or w.shape[-1]))
        score = score_text(model, tokenizer, text)
        before = before or score
        print(f"{label:24} {score}, {100 * (score.perplexity / before.perplexity - 1):+.3f} %")


def show_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        text = tokenizer.decode(model.generate(**ids, max_new_tokens=80)[0], skip_special_tokens=True)
        print("-" * 40, text, sep="\n", flush=True)


def make_demo(args: argparse.Namespace) -> None:
    training, heldout = split_heldout(read_corpus(args.corpus or default_corpus()), n_chars=90_000)
    tokenizer = train_tokenizer(training)
    tokens = token_stream(tokenizer, training).to(args.device)
    print(f"{sum(map(len, training)) / 1e6:.1f} MB to train on, {len(tokens) / 1e6:.2f} M tokens", flush=True)

    torch.manual_seed(0)
    model = build_model(args.family, tokenizer.eos_token_id, args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, tokens, args, lambda: score_text(model, tokenizer, heldout))
    save(model, tokenizer, heldout, args.out)

    model = AutoModelForCausalLM.from_pretrained(args.out / "checkpoint", dtype="auto").to(args.device)
    score = score_text(model, tokenizer, heldout)
    print(f"held-out, as loaded again: {score}")
    for layer, shares in enumerate(score.shares.tolist()):
        print(f"layer {layer}: tokens per expert, in percent:", *(f"{share:.1f}" for share in shares))
    show_samples(model, tokenizer)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, heldout: str, out: Path) -> None:
    n_bytes = sum(2 * p.numel() for p in model.parameters())
    model.save_pretrained(out / "checkpoint", max_shard_size=n_bytes // 2 + 100_000)  # two shards, about equal
    tokenizer.save_pretrained(out / "checkpoint")
    (out / "heldout.txt").write_text(heldout, encoding="utf-8", newline="\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="train, and write checkpoint/ and heldout.txt there")
    what.add_argument("--check-quantization", type=Path, metavar="DIR", help="score what --out wrote, quantized")
    parser.add_argument("--family", choices=("qwen3_moe", "olmoe"), default="qwen3_moe", help="default: the demo's")
    parser.add_argument("--corpus", type=Path, nargs="+", metavar="PATH", help="folders of .py and .rst, or files")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training; compilation comes before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--rows", type=int, default=64, help="windows of 1024 tokens in a batch")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--weight-decay", type=float, default=0.4)
    parser.add_argument("--dropout", type=float, default=0.15)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.check_quantization:
        check_quantization(arguments.check_quantization)
    else:
        make_demo(arguments)
