"""`python -m flexgen.complete`: continue one text, or chat at a prompt.

    python -m flexgen.complete --model DIR --prompt "Once upon a time"
    python -m flexgen.complete --model DIR --interactive

The completion and one newline are written to stdout while it is generated; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from flexgen.cli.flags import add_model_flags, add_policy_flags, print_stderr, read_policy, run
from flexgen.cli.help import HelpFormatter
from flexgen.cli.prompts import normalized, read_text
from flexgen.cli.sampling import add_sampling_flags, check_sampling_flags
from flexgen.engine.conveniences import Conveniences
from flexgen.engine.model import OptLM
from flexgen.engine.text import encode, encode_chat, load_tokenizer
from flexgen.errors import FlexGenError, RequestError
from flexgen.models import open_model
from flexgen.runtime.request import check_length, read_request
from flexgen.workload import Workload

_PROMPT = ">>> "
_RESET = "/reset"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), complete, argv)


def complete(args: argparse.Namespace) -> None:
    """Open the model, then continue the prompt or read prompts."""
    _check(args)
    given = None if args.interactive else _given(args)
    policy = read_policy(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that is not UTF-8
    if args.interactive and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `encode` rejects the line; the next one is read
    ids = _fitting(args, given)
    with (
        contextlib.suppress(BrokenPipeError),  # the reader has closed the pipe
        OptLM(
            args.model,
            policy,
            workload=None if ids is None else Workload(len(ids), args.max_tokens, 1),
            device=args.device,
            dtype=args.dtype,
            offload_dir=args.offload_dir,
            fast_start=args.fast_start,
            order=args.order,
        ) as model,
    ):
        if ids is None:
            _ask(model, args)
        else:
            _answer(model, ids, args)


def _check(args: argparse.Namespace) -> None:
    """Raise RequestError for invalid flags and closed standard streams."""
    check_sampling_flags(args)
    if args.interactive and (args.prompt is not None or args.prompt_file is not None):
        raise RequestError("--interactive reads prompts from you; leave --prompt and --prompt-file out")
    if sys.stdout is None:
        raise RequestError(
            "standard output is closed, and completions are written to it; redirect it to a file"
        )
    if args.interactive and sys.stdin is None:
        raise RequestError("standard input is closed, and --interactive reads prompts from it; use --prompt")


def _given(args: argparse.Namespace) -> str:
    """The prompt: from the flag, a file or standard input."""
    if args.prompt is not None and args.prompt_file is not None:
        raise RequestError("--prompt and --prompt-file are both given; give one of them")
    if args.prompt is not None:
        prompt: str = args.prompt
        return prompt
    try:
        if args.prompt_file is not None:
            text = read_text(args.prompt_file)
        elif sys.stdin is not None and not sys.stdin.isatty():
            text = normalized(sys.stdin.read())
        else:
            text = ""
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input is not UTF-8 text: byte {error.start} is {error.reason}; convert it to UTF-8"
        ) from None
    text = text.removesuffix("\n")  # editors and echo append one
    if not text and args.prompt_file is not None:
        raise RequestError(f"{args.prompt_file} is empty; give a file with a prompt")
    if not text:
        raise RequestError(
            "there is no prompt: give --prompt TEXT or --prompt-file FILE, pipe a text into the command, or use "
            "--interactive"
        )
    return text


def _fitting(args: argparse.Namespace, prompt: str | None) -> list[int] | None:
    """The ids of the prompt, or None without one.

    Raises RequestError for a prompt that is too long and ModelError for a model without a tokenizer, before weights
    are loaded.
    """
    spec, checkpoint = open_model(args.model)
    tokenizer = load_tokenizer(checkpoint.directory, spec.name)
    if prompt is None:
        return None
    ids = encode(tokenizer, prompt, args.special_tokens)
    check_length(spec, read_request(spec, [ids], [[1] * len(ids)] if ids else None), args.max_tokens)
    return ids


def _answer(model: Conveniences, ids: Sequence[int], args: argparse.Namespace) -> str:
    """Write the completion of a prompt while it is generated, and return it."""
    pieces = []
    with model.stream_text(
        ids,
        args.max_tokens,
        stop=args.stop,
        do_sample=args.temperature > 0,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    ) as stream:
        for piece in stream:
            pieces.append(piece)
            _show(piece)
    _show("\n")
    return "".join(pieces)


def _show(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        # Otherwise the interpreter would write the buffered text again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _ask(model: OptLM, args: argparse.Namespace) -> None:
    """Read prompts and answer them until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (adds line editing and a history to `input`)
    prompts = _Prompts(model.tokenizer, args.special_tokens)
    print_stderr(
        f"{model.spec.name} on {model.device}. {prompts.about} Ctrl-C stops an answer, Ctrl-D exits."
    )
    with model.conversation() as conversation:  # computes only the new part of the text for each answer
        for line in _lines():
            if not line.strip():
                continue
            if line.strip() == _RESET:
                print_stderr(prompts.reset())
                continue
            try:
                prompts.answered(line, _answer(conversation, prompts.ids(line), args))
            except FlexGenError as error:
                print_stderr(f"{error}{prompts.hint}")
            except KeyboardInterrupt:
                print_stderr("\nanswer stopped; it is not part of the conversation")
    print_stderr("\nbye")


def _lines() -> Iterator[str]:
    """The lines that you type. Ctrl-C drops an incomplete line; a second Ctrl-C ends the input."""
    dropped = False
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            if dropped:
                return
            print_stderr("\npress Ctrl-C again or Ctrl-D to exit")
            dropped = True
            continue
        if line is None:
            return
        dropped = False
        yield line


class _Prompts:
    """Makes prompts of lines: a turn of a conversation if the tokenizer has a chat template, else the line itself."""

    def __init__(self, tokenizer: Any, special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._chats = bool(getattr(tokenizer, "chat_template", None))
        self._messages: list[dict[str, str]] = []

    @property
    def about(self) -> str:
        if self._chats:
            return f"Each line is a message; {_RESET} begins a new conversation."
        return "Each line is continued on its own: the tokenizer has no chat template."

    @property
    def hint(self) -> str:
        """A hint after a turn that failed."""
        return f" ({_RESET} clears the conversation)" if self._messages else ""

    def ids(self, line: str) -> list[int]:
        if not self._chats:
            return encode(self._tokenizer, line, self._special_tokens)
        return encode_chat(self._tokenizer, [*self._messages, {"role": "user", "content": line}])

    def answered(self, line: str, answer: str) -> None:
        """Add a completed turn to the conversation."""
        if self._chats:
            self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]

    def reset(self) -> str:
        self._messages.clear()
        return "a new conversation" if self._chats else f"there is no conversation. {self.about}"


def _read_line() -> str | None:
    """The next line, or None after the last. `input` is used only on a terminal, because it writes to stdout."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(_PROMPT)
        except EOFError:
            return None
    sys.stderr.write(_PROMPT)
    sys.stderr.flush()
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.complete",
        formatter_class=HelpFormatter,
        description="Continue a text. Without a prompt flag, the prompt is read from standard input.",
    )
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="text to continue")
    add(
        "--prompt-file",
        metavar="FILE",
        help="file with the text to continue; one newline at its end is ignored",
    )
    add(
        "--interactive",
        action="store_true",
        help="read prompts in a loop, as a conversation if the model has a chat template",
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
