"""Train the small Mixture-of-Experts model that ships in moeplug/demo, on the text of CPython itself.

    python examples/train_demo.py --out demo                            # train and save, 5 minutes on one GPU
    python examples/train_demo.py --check-quantization moeplug/demo     # what 8 and 4 bits do to it, on a CPU

The result is a Qwen3-MoE checkpoint as the family has it on disk (`DIR/checkpoint`) and the text it was scored on
(`DIR/heldout.txt`). The text is reStructuredText and Python: small, under one licence, and on every Python
developer's disk, so that whoever doubts a number of the demo can make the model again.
"""

import argparse
import gzip
import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig

END = "<|endoftext|>"
CONTEXT = 1024  # tokens, in training and in scoring
PROMPTS = ("The :mod:`", "Return a new ", "def __init__(self", ".. versionchanged:: 3.")


# --- text -----------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    name: str  # path below the corpus folder, so that the held-out choice is the same on every machine
    text: str

    @property
    def is_prose(self) -> bool:
        return self.name.endswith(".rst")

    @property
    def is_test(self) -> bool:
        return bool(TEST_PARTS.intersection(Path(self.name).parts))


# Tables are no language (encodings, entities); topics is a second copy of the reference manual, which would put held-out
# pages into the training text.
SKIPPED_PARTS = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
SKIPPED_FILES = ("entities.py", "_sysconfigdata")
TEST_PARTS = {"test", "tests", "idle_test"}


def default_corpus() -> list[Path]:
    """The running Python's standard library, and what Debian's python3, -doc and -examples packages put beside it."""
    found = [Path(sysconfig.get_path("stdlib"))]
    for name in ("html/_sources", "examples", "NEWS.gz", "HISTORY.gz"):
        found += sorted(Path("/usr/share/doc").glob(f"python3.*/{name}"))[-1:]
    return found


def read_corpus(paths: Iterable[Path]) -> list[Document]:
    """Every .py and .rst file below the paths, once per content, in the order of their names; a file named is taken."""
    documents: dict[str, Document] = {}
    for root in paths:
        files = [root] if root.is_file() else [p for p in root.rglob("*") if is_wanted(p.relative_to(root))]
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
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (UnicodeDecodeError, OSError):
        return ""
    printed = "".join(text.split())
    return text if sum(map(str.isalpha, printed)) > len(printed) / 2 else ""


def split_heldout(documents: list[Document], n_bytes: int) -> tuple[list[str], str]:
    """Return (training texts, held-out text): whole files by hash of name, half of the bytes prose and half code.

    Files of 2 to 12 kB, so that a held-out text of 80 kB still is a dozen subjects. A training text loses every
    paragraph that stands in the held-out text too (licence notes, examples that the manual repeats).
    """
    ranked = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    heldout: list[Document] = []
    for is_prose in (True, False):
        left = n_bytes // 2
        for document in ranked:
            size = len(document.text.encode())
            if document.is_prose == is_prose and not document.is_test and 2_000 <= size <= min(left, 12_000):
                heldout.append(document)
                left -= size
    seen = {p for d in heldout for p in map(normalized, d.text.split("\n\n")) if len(p) >= 40}
    names = {d.name for d in heldout}  # another version of a held-out file would give it away as well
    training = [without_paragraphs(d.text, seen) for d in documents if d.name not in names]
    print("held out:", *(d.name for d in heldout))
    return [text for text in training if text], "\n\n".join(d.text.strip() for d in heldout) + "\n"


def normalized(paragraph: str) -> str:
    return " ".join(paragraph.split())


def without_paragraphs(text: str, unwanted: set[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if normalized(p) not in unwanted)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: no text is out of vocabulary, and decode(encode(text)) == text, which bits per byte needs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of token ids, each text ended by END. int32, (tokens,)."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return torch.cat([torch.tensor([*e.ids, tokenizer.eos_token_id], dtype=torch.int32) for e in encodings])


# --- model ----------------------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, eos: int) -> nn.Module:
    """A Qwen3-MoE in bfloat16. H=256 and I=128 are multiples of 128, so that schemes with groups of 128 fit."""
    config = Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,  # of dense layers: there is none
        moe_intermediate_size=128,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        router_aux_loss_coef=args.balance,
        eos_token_id=eos,
    )
    # grouped_mm takes bfloat16 weights alone; the optimizer below holds the float32 ones
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=eos)
    return model.to(args.device)


def add_dropout(model: nn.Module, p: float) -> None:
    """Drop values of what attention and experts add to the residual: Qwen3-MoE has no dropout of its own there.

    Five minutes of an H100 are some 50 passes over 20 MB of text; without it the model learns the text by heart.
    Hooks leave the saved model as the family has it.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))
        layer.mlp.register_forward_hook(lambda m, _, out: F.dropout(out, p, m.training))


def losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy in nats per token, balance loss: 1.0 where every expert gets the same share).

    transformers' own balance loss sums over layers first, so that two layers may cancel; this one is per layer.
    """
    out = model.model(inputs, output_router_logits=True, use_cache=False)
    logits = model.lm_head(out.last_hidden_state).float()
    config = model.config
    balance = logits.new_zeros(())
    for router_logits in out.router_logits:
        share = chosen_share(router_logits, config.num_experts_per_tok)
        balance += config.num_experts * (share * router_logits.float().softmax(-1).mean(0)).sum()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), balance / len(out.router_logits)


def chosen_share(router_logits: Tensor, top_k: int) -> Tensor:
    """Return (E,): the share of (token, choice) pairs that each expert gets. router_logits: (M, E)."""
    chosen = F.one_hot(router_logits.topk(top_k).indices, router_logits.shape[-1])
    return chosen.float().mean((0, 1))


# --- optimizer ------------------------------------------------------------------------------------------------------


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for embedding, routers and norms; float32 masters of all.

    One learning rate serves both: Muon's step is scaled to AdamW's usual root mean square of 0.2 per weight.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        parameters = dict(model.named_parameters())
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for name, p in parameters.items():
            if name.endswith(("_proj", "_proj.weight")):
                by_shape.setdefault(p.shape, []).append(p)
        # equal shapes are stacked: one batched product instead of one launch per matrix
        self.matrices = [(ps, stacked(ps), torch.zeros_like(stacked(ps))) for ps in by_shape.values()]
        muon = {p for ps in by_shape.values() for p in ps}
        self.rest = [(p, p.detach().float().requires_grad_()) for p in parameters.values() if p not in muon]
        groups = [
            {"params": [m for _, m in self.rest if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for _, m in self.rest if m.ndim == 1], "weight_decay": 0.0},  # norms stay near 1
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, master in self.rest:
            master.grad = p.grad.float()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for p, master in self.rest:
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
    if wide := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if wide else x).float()


# --- training -------------------------------------------------------------------------------------------------------


def batches(tokens: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), (rows, CONTEXT) each: all windows in random order, cut elsewhere on every pass."""
    span = torch.arange(CONTEXT + 1, device=tokens.device)
    while True:
        cut = int(torch.randint(CONTEXT, ()))
        starts = cut + CONTEXT * torch.randperm((len(tokens) - 1 - cut) // CONTEXT)
        for chosen in starts.to(tokens.device).split(rows):
            if len(chosen) == rows:
                window = tokens[chosen[:, None] + span].long()
                yield window[:, :-1], window[:, 1:]


def learning_rate(peak: float, progress: float) -> float:
    """Up over the first 3 % of the time, then down in a straight line to zero at its end."""
    return peak * min(progress / 0.03, (1 - progress) / 0.97)


def train(model: nn.Module, tokens: Tensor, args: argparse.Namespace, score: Callable[[], "Score"]) -> None:
    """Train until the clock says stop; the schedule follows the clock too, so a slow machine ends at zero as well."""
    optimizer = Optimizer(model, args.weight_decay)
    add_dropout(model, args.dropout)
    step_losses = torch.compile(losses, dynamic=False) if args.compile else losses
    limit = 60 * args.minutes
    start = next_report = 0.0
    for step, (inputs, targets) in enumerate(batches(tokens, args.rows)):
        if step == 3:  # compilation and the first allocations are not training
            start = time.perf_counter()
        elapsed = time.perf_counter() - start if start else 0.0
        if elapsed >= limit:
            break
        model.train()
        nats, balance = step_losses(model, inputs, targets)
        (nats + args.balance * balance).backward()
        optimizer.step(learning_rate(args.lr, max(elapsed / limit, 1e-3)))
        model.zero_grad(set_to_none=True)
        if step % 10 == 0:
            nats.item()  # the clock must not run ahead of the GPU's queue
        if elapsed >= next_report:
            next_report += limit / 20
            seen = (step + 1) * inputs.numel()
            print(
                f"{elapsed:6.1f} s  step {step:6d}  passes {seen / len(tokens):5.1f}  {seen / max(elapsed, 1):.0f} tok/s"
                f"  train {nats.item():.3f} nats  balance {balance.item():.3f}  held-out {score()}",
                flush=True,
            )


# --- scoring --------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    bits_per_byte: float
    perplexity: float  # per token
    shares: Tensor  # (layers, E): the share of tokens of each expert, in percent

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.4f} bits/byte, perplexity {self.perplexity:.3f}"


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, n_bytes: int, rows: int = 8) -> Score:
    """Score ids, (tokens,), in windows of CONTEXT tokens that do not overlap; END stands before the first token."""
    model.eval()
    ids = F.pad(ids.long(), (1, 0), value=model.config.eos_token_id).to(model.device)
    n_full = (len(ids) - 1) // CONTEXT
    windows = list(ids[: n_full * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT).split(rows))
    if len(ids) - 1 > n_full * CONTEXT:
        windows.append(ids[None, n_full * CONTEXT :])
    nats = 0.0
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for window in windows:
        out = model.model(window[:, :-1], output_router_logits=True, use_cache=False)
        logits = model.lm_head(out.last_hidden_state).float()
        nats += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
        shares = [chosen_share(r, model.config.num_experts_per_tok) for r in out.router_logits]
        counts += torch.stack(shares).cpu() * (window.numel() - len(window))
    n_tokens = len(ids) - 1
    return Score(nats / math.log(2) / n_bytes, math.exp(nats / n_tokens), 100 * counts / n_tokens)


def score_text(model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: str) -> Score:
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return evaluate(model, ids, len(text.encode()))


def fake_quantize(w: Tensor, largest: int, group: int) -> Tensor:
    """Return w, (..., K), rounded to integers of at most `largest` times amax / largest of each group of weights."""
    groups = w.float().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    return ((groups / scale).round() * scale).flatten(-2).to(w.dtype)


@torch.no_grad()
def check_quantization(folder: Path) -> None:
    """Print what plain rounding of all expert weights does to the held-out perplexity, everything else in float32."""
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    before = None
    for label, largest, group in (
        ("as saved", 0, 0),
        ("int8, a scale per row", 127, 0),
        ("4 bits, groups of 128", 7, 128),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
        for layer in model.model.layers if largest else ():
            for w in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                w.copy_(fake_quantize(w, largest, group or w.shape[-1]))
        score = score_text(model, tokenizer, text)
        before = before or score
        print(f"{label:24} {score}, {100 * (score.perplexity / before.perplexity - 1):+.3f} %")


def show_samples(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        text = tokenizer.decode(model.generate(**ids, max_new_tokens=80)[0], skip_special_tokens=True)
        print("-" * 40, text, sep="\n")


# --- the whole way --------------------------------------------------------------------------------------------------


def make_demo(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    documents = read_corpus(args.corpus or default_corpus())
    training, heldout = split_heldout(documents, args.heldout_bytes)
    tokenizer = train_tokenizer(training, args.vocab)
    tokens = token_stream(tokenizer, training).to(args.device)
    n_bytes = sum(len(text.encode()) for text in training)
    print(f"{len(training)} texts, {n_bytes / 1e6:.1f} MB, {len(tokens) / 1e6:.2f} M tokens", flush=True)

    model = build_model(args, tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, tokens, args, lambda: score_text(model, tokenizer, heldout))
    save(model, tokenizer, heldout, args.out)

    model = AutoModelForCausalLM.from_pretrained(args.out / "checkpoint", dtype="auto").to(args.device)
    score = score_text(model, tokenizer, heldout)
    print(f"held-out, as loaded again: {score}")
    for layer, shares in enumerate(score.shares.tolist()):
        print(f"layer {layer}: tokens per expert, in percent:", *(f"{share:.1f}" for share in shares))
    show_samples(model, tokenizer)


def save(model: nn.Module, tokenizer: PreTrainedTokenizerFast, heldout: str, out: Path) -> None:
    n_bytes = sum(2 * p.numel() for p in model.parameters())
    model.save_pretrained(out / "checkpoint", max_shard_size=n_bytes // 2 + 100_000)  # two shards, about equal
    tokenizer.save_pretrained(out / "checkpoint")
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="train, and write checkpoint/ and heldout.txt there")
    where.add_argument("--check-quantization", type=Path, metavar="DIR", help="score what --out wrote, quantized")
    parser.add_argument("--corpus", type=Path, nargs="+", metavar="PATH", help="folders or files of .py and .rst text")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in (("vocab", 2048), ("hidden", 256), ("layers", 5), ("heads", 8), ("rows", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("lr", 4e-3), ("weight-decay", 0.1), ("dropout", 0.1), ("balance", 0.01)):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--heldout-bytes", type=int, default=90_000)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.check_quantization:
        check_quantization(arguments.check_quantization)
    else:
        make_demo(arguments)
