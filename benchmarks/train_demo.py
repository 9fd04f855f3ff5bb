"""Train the embedded model `demo` from scratch, or evaluate an existing one.

    python benchmarks/train_demo.py --out flexgen/demo/model --steps 2800 --seed 0
    python benchmarks/train_demo.py --evaluate flexgen/demo/model --records 2000

The training text is part of every Python installation: the docstrings of the standard library. The records are
generated (`flexgen.demo.tasks`); the held-out records for the evaluation are never used in training. The script
trains the tokenizer, then a small OPT on one CPU thread, and saves it regularly. With `--steps`, the result depends
only on the seed and the machine. With `--minutes`, the schedule follows the clock, and the card has the number of
steps.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from flexgen.demo.tasks import TASKS, Record, accuracy, records

SCRIPT = "benchmarks/train_demo.py"
VOCAB_SIZE = 1536
POSITIONS = 512
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # their ids in OPT: 0, 1, 2, 3
PAD, EOS = 1, 2  # as in OPT, </s> is at the beginning and at the end of a text
TEXT_SHAPES = ((4, 128), (2, 256), (1, 512))  # rows and columns of a batch of running text
TASK_SHARES = (*TASKS, "field", "wrong", "lookup")  # tasks that are learned slowly are trained more often
EVALUATION_SEED = 1_000_000
LONGEST_ANSWER = 14  # tokens, including the newline


@dataclass
class Progress:
    """The progress of the training, for the card."""

    seed: int
    steps: int = 0
    tokens_seen: int = 0
    minutes: float = 0.0


# ---------------------------------------------------------------------------------------------------- text


def docstrings() -> list[str]:
    """The distinct docstrings of the standard library without its tests, in the order of the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if left_out & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 20:
                    found[text] = None
    return list(found)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits digits and begins every text with `</s>`, like OPT's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


# ----------------------------------------------------------------------------------------------- batches


def record_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of training records of similar length: ids, and targets of the same shape.

    Only the answer, its newline and the closing `</s>` are targets; elsewhere the target is -100.
    """
    pool = 24 * rows
    order = random.Random(seed)
    for chunk in range(EVALUATION_SEED):
        drawn = records(pool, seed * EVALUATION_SEED + chunk, TASK_SHARES, held_out=False)
        whole = tokenizer([record.text for record in drawn])["input_ids"]
        replies = [f" {record.answer}\n" for record in drawn]
        answers = tokenizer(replies, add_special_tokens=False)["input_ids"]
        pairs = sorted(zip(whole, answers, strict=True), key=lambda pair: len(pair[0]))
        groups = [pairs[at : at + rows] for at in range(0, pool, rows)]
        order.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            ids = torch.full((rows, width), PAD)
            targets = torch.full((rows, width), -100)
            for row, (tokens, answer) in enumerate(group):
                end, start = len(tokens), len(tokens) - len(answer)
                ids[row, :end] = torch.tensor(tokens)
                targets[row, start - 1 : end] = torch.tensor([*tokens[start:], EOS])
            yield ids, targets


def text_batches(stream: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless windows of running text that begin with `</s>`. Long windows train every position."""
    order = random.Random(seed)
    while True:
        for rows, width in TEXT_SHAPES:
            starts = [order.randrange(len(stream) - width) for _ in range(rows)]
            targets = torch.stack([stream[start : start + width] for start in starts])
            opening = torch.full((rows, 1), EOS)
            yield torch.cat([opening, targets[:, :-1]], dim=1), targets


def text_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], seed: int) -> torch.Tensor:
    """All docstrings as one row of tokens, with a sequence of training records after every fourth."""
    pieces = []
    for number, text in enumerate(texts):
        pieces.append(text)
        if number % 4 == 0:
            run = records(4, seed * EVALUATION_SEED + EVALUATION_SEED - 1 - number, held_out=False)
            pieces.append("".join(record.text for record in run))
    ids = tokenizer(pieces, verbose=False)["input_ids"]
    return torch.tensor([token for piece in ids for token in piece])


# ---------------------------------------------------------------------------------------------- training


def build_model(layers: int, hidden: int, heads: int) -> OPTForCausalLM:
    """An untrained pre-norm OPT with tied embeddings and no dropout."""
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        max_position_embeddings=POSITIONS,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        init_std=0.03,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return OPTForCausalLM(config)


def batch_loss(model: OPTForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the targets, with equal weight for each row. Logits are computed only for targets."""
    wanted = targets != -100
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[wanted])
    share = (1 / wanted.sum(dim=1, keepdim=True)).expand_as(wanted)[wanted]
    return (share * F.cross_entropy(logits.float(), targets[wanted], reduction="none")).sum() / len(ids)


def learning_rate(done: float, step: int, peak: float) -> float:
    """Linear warmup over 300 steps, then a cosine decay to zero as `done` approaches one."""
    return peak * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(args: argparse.Namespace) -> None:
    """Train tokenizer and model, save them about every two minutes, and finally write the card."""
    torch.manual_seed(args.seed)
    texts = docstrings()
    sample = [record.text for record in records(60_000, args.seed, held_out=False)]
    tokenizer = train_tokenizer([*texts, *sample])
    stream = text_stream(tokenizer, texts, args.seed)
    model = build_model(args.layers, args.hidden, args.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    print(f"{len(texts)} docstrings, {len(stream)} tokens, {model.num_parameters()} parameters", flush=True)

    progress = Progress(args.seed)
    from_records, from_text = record_batches(tokenizer, args.seed, args.rows), text_batches(stream, args.seed)
    began = time.monotonic()
    mean_loss = dict.fromkeys(("records", "text"), math.log(VOCAB_SIZE))
    while True:
        progress.minutes = (time.monotonic() - began) / 60
        done = progress.steps / args.steps if args.steps else progress.minutes / args.minutes
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, progress.steps, args.lr)
        sources = [("records", from_records, 1.0)]
        if progress.steps % 2:
            sources.append(("text", from_text, 0.2))
        for name, batches, weight in sources:
            ids, targets = next(batches)
            loss = batch_loss(model, ids, targets)
            (weight * loss).backward()
            mean_loss[name] += 0.02 * (loss.item() - mean_loss[name])
            progress.tokens_seen += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.steps += 1
        if progress.steps % 100 == 0:
            rate = progress.tokens_seen / (60 * progress.minutes + 1e-9)
            losses = " ".join(f"{name} {loss:.3f}" for name, loss in mean_loss.items())
            print(
                f"step {progress.steps} {done:4.0%} {progress.minutes:.1f} min {rate:.0f} tokens/s {losses}",
                flush=True,
            )
        if progress.steps % 500 == 0:
            shares = measure(model, tokenizer, records(250, EVALUATION_SEED - 1))
            print("    " + show(shares), flush=True)
            save(model, tokenizer, args.out, card(progress, shares, 250, final=False))
    save(model, tokenizer, args.out, card(progress, {}, 0, final=False))
    evaluate(args.out, args.records, progress)


# -------------------------------------------------------------------------------- measuring and saving


@torch.no_grad()
def complete(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], rows: int = 128
) -> list[str]:
    """The greedy completion of each prompt, up to its first newline."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    completions: dict[int, str] = {}
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for at in range(0, len(by_length), rows):
        numbers = by_length[at : at + rows]
        batch = tokenizer([prompts[number] for number in numbers], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            eos_token_id=[EOS, *newline],
            pad_token_id=PAD,
        )
        new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        completions.update(zip(numbers, new, strict=True))
    return [completions[number] for number in range(len(prompts))]


def measure(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Record]
) -> dict[str, float]:
    """The share of correct greedy completions for each task."""
    model.eval()
    shares = accuracy(asked, complete(model, tokenizer, [record.prompt for record in asked]))
    model.train()
    return shares


def show(shares: dict[str, float]) -> str:
    """The shares in one line."""
    return "  ".join(f"{task} {share:.1%}" for task, share in shares.items())


def card(progress: Progress, shares: dict[str, float], count: int, final: bool) -> dict[str, object]:
    """The card of the model: its origin and its accuracy."""
    return {
        "model": "demo",
        "text": f"docstrings of the standard library of Python {platform.python_version()}",
        "tasks": list(TASKS),
        "training": asdict(progress) | {"minutes": round(progress.minutes, 1), "finished": final},
        "training_command": f"python {SCRIPT} " + " ".join(sys.argv[1:]),
        "accuracy": {task: round(share, 4) for task, share in shares.items()},
        "accuracy_is": "share of exact answers: held-out records, greedy, float32 on the float16 weights",
        "accuracy_records": count,
        "accuracy_seed": EVALUATION_SEED,
        "accuracy_command": f"python {SCRIPT} --evaluate flexgen/demo/model --records {count}",
    }


def save(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, about: dict[str, object]
) -> None:
    """Write the model folder with weights in float16. Training continues in float32."""
    out.mkdir(parents=True, exist_ok=True)
    stored = OPTForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.half().save_pretrained(out)
    GenerationConfig(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    known.pop("backend", None)
    known["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name in all releases of transformers
    settings.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)
    write_card(out, about)


def write_card(out: Path, about: dict[str, object]) -> None:
    """Write `CARD.json`."""
    (out / "CARD.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def evaluate(folder: Path, count: int, progress: Progress | None = None) -> dict[str, float]:
    """Evaluate the model of a folder on held-out records in float32. After training, also write the card."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shares = measure(model, tokenizer, records(count, EVALUATION_SEED))
    print(f"{count} held-out records, float32, greedy: {show(shares)}", flush=True)
    if progress is not None:
        write_card(folder, card(progress, shares, count, final=True))
    return shares


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flexgen/demo/model"), help="output folder")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only evaluate the model in DIR")
    parser.add_argument("--records", type=int, default=2000, help="held-out records for the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0, help="training time")
    parser.add_argument("--steps", type=int, default=0, help="training steps, instead of --minutes")
    parser.add_argument("--rows", type=int, default=64, help="records per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = arguments()
    if given.evaluate:
        evaluate(given.evaluate, given.records)
    else:
        train(given)
