"""The commands. Everything heavy is imported inside them: ``--help`` must not pay for torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

import streamshards
from streamshards.cli.codes import MEANINGS, ExitCode, Stopped
from streamshards.cli.progress import progress_bar
from streamshards.errors import OptionInvalid
from streamshards.options import OrderOptions, RetryOptions

_EXIT_CODES: Final = "\n".join(["\b", "Exit codes:", *(f"{int(code):>5}  {text}" for code, text in MEANINGS.items())])


class _Commands(TyperGroup):
    """The commands, which leave it to ``outcome`` to say how they were stopped: typer would say it in its own way."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for.

        Raises:
            Stopped: Ctrl-C, or the reader of stdout is gone.
        """
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # while it can still be told from a defect that nobody reads
        except KeyboardInterrupt:
            raise Stopped(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:
            raise Stopped(ExitCode.PIPE_CLOSED) from None
        return result


app = typer.Typer(
    cls=_Commands,
    name="streamshards",
    help="Pack, index, look at and check datasets of zstd-compressed .pt shards, on disk or in S3.",
    epilog=_EXIT_CODES,
    add_completion=False,
    rich_markup_mode=None,  # plain help: it survives pipes, and does not load rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

state_app = typer.Typer(
    help="Look at checkpoints.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(state_app, name="state")

cache_app = typer.Typer(
    help="Look after the node cache.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")

_RETRY: Final = RetryOptions(first_contact_s=20.0)
"""A person who mistyped an endpoint should know within 30 s, importing torch on a busy machine included."""


class Mode(str, Enum):
    """What ``pack`` does where there is a dataset."""

    ERROR = "error"
    APPEND = "append"
    REPLACE = "replace"


class IndexMode(str, Enum):
    """What ``index`` does where there is an index."""

    ERROR = "error"
    REPLACE = "replace"


class FileLayout(str, Enum):
    """How samples lie in ``.pt`` files; see ``streamshards.shard.layouts``."""

    AUTO = "auto"
    COLUMNS = "columns"
    ROWS = "rows"
    SAMPLES = "samples"
    SAMPLE = "sample"
    SHARD = "shard"


Url = Annotated[str, typer.Argument(metavar="URL", help="A folder, s3://bucket/prefix, or another fsspec url.")]
EndpointUrl = Annotated[str | None, typer.Option(help="Of an S3 server that is not AWS: http://127.0.0.1:9000.")]
StorageOptions = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="For the file system: '{\"anon\": true}'. AWS_* variables work without."),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let the .pt files run any code they hold. Only for files of your own.")
]
Layout = Annotated[
    FileLayout,
    typer.Option(help="columns: dict of equally long tensors; rows: one tensor; samples: list; sample: one per file."),
]
StateFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A checkpoint, JSON or of torch.save: order, epoch and position are its own."),
]
StatePath = Annotated[
    str | None,
    typer.Option(metavar="KEYS", help='Which state in it, if there are several: "loaders.train". See "state show".'),
]
CacheDirectory = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Where the cache lies; by default where CacheOptions() has it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamshards {streamshards.__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and everything that is logged.")] = False,
) -> None:
    # Nothing to do: --version has its callback, and outcome.run takes --debug out, so that it may stand anywhere.
    pass


@app.command()
def pack(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A folder or url with .pt files, or a dataset.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Where the dataset goes.")],
    shard_bytes: Annotated[str, typer.Option(help="About how large a shard is before compression.")] = "32MiB",
    compression: Annotated[str, typer.Option(help="auto, zstd:-7 (quick) to zstd:22 (small), or none.")] = "auto",
    mode: Annotated[Mode, typer.Option(help="What to do where there is a dataset at DST.")] = Mode.ERROR,
    layout: Layout = FileLayout.AUTO,
    trust_pickle: TrustPickle = False,
    endpoint_url: EndpointUrl = None,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Rewrite .pt files (plain, .zst, .gz) into columnar shards.

    The first file decides how samples lie in all of them. One file is in memory at a time. Nothing is visible at DST
    before everything went well.
    """
    options = _options(endpoint_url, storage_options)
    from streamshards.cli.show import packed_json, packed_line
    from streamshards.convert.packing import pack as do_pack

    with progress_bar("packing") as progress:
        packed = do_pack(
            src,
            dst,
            shard_bytes=shard_bytes,
            compression=compression,
            mode=mode.value,
            layout=layout.value,
            trust_pickle=trust_pickle,
            storage_options=options,
            retry=_RETRY,
            progress=progress,
        )
    if as_json:
        _print_json(packed_json(packed, dst))
    else:
        typer.echo(packed_line(packed, dst))


@app.command()
def index(
    url: Url,
    layout: Layout = FileLayout.AUTO,
    mode: Annotated[IndexMode, typer.Option(help="What to do where there is an index.")] = IndexMode.ERROR,
    trust_pickle: TrustPickle = False,
    endpoint_url: EndpointUrl = None,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Make a dataset of the .pt files at URL in place, without rewriting them; or rebuild a lost index.

    Every file is read and decoded once. Shards of streamshards and foreign files cannot stand in one index.
    """
    options = _options(endpoint_url, storage_options)
    from streamshards.cli.show import counted, human_bytes
    from streamshards.convert.indexing import build_index
    from streamshards.convert.summary import summary_of

    with progress_bar("indexing") as progress:
        made = build_index(
            url,
            layout=layout.value,
            mode=mode.value,
            trust_pickle=trust_pickle,
            storage_options=options,
            retry=_RETRY,
            progress=progress,
        )
    if as_json:
        _print_json({"url": url, **summary_of(made)})
    else:
        files, samples = counted(made.num_shards, "file"), counted(made.num_samples, "sample")
        typer.echo(f"indexed {files} of layout {made.layout} at {url}: {samples}, {human_bytes(int(made.sizes.sum()))}")


@app.command()
def inspect(
    url: Url, endpoint_url: EndpointUrl = None, storage_options: StorageOptions = None, as_json: Json = False
) -> None:
    """Show what a dataset is: samples, schema, sizes, shards. Reads the index only."""
    options = _options(endpoint_url, storage_options)
    from streamshards.cli.show import summary_lines
    from streamshards.convert.summary import summarize

    summary = summarize(url, storage_options=options, retry=_RETRY)
    if as_json:
        _print_json(summary)
    else:
        typer.echo("\n".join(summary_lines(summary)))


@app.command()
def cat(
    url: Url,
    limit: Annotated[
        int | None, typer.Option(help="How many samples at most; 10 unless you say, or all N of --last N.")
    ] = None,
    start: Annotated[
        int | None, typer.Option(help="The first sample in the order of the index; negative: from the end.")
    ] = None,
    position: Annotated[
        int | None, typer.Option(help="The first sample in the order of training: its place in the epoch, from 0.")
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="N", help="The N samples just before the position, such as its last batch.")
    ] = None,
    epoch: Annotated[int | None, typer.Option(help="Of training, from 0; by default the state's, or 0.")] = None,
    state: StateFile = None,
    state_path: StatePath = None,
    shuffle: Annotated[
        bool | None, typer.Option("--shuffle/--no-shuffle", help="Without a state: whether training shuffled.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Without a state: of the shuffle.")] = None,
    lanes: Annotated[
        int | None, typer.Option(help="Without a state: as in OrderOptions, or ranks times workers at the first start.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Without a state: as in OrderOptions, or the batch size of a rank.")
    ] = None,
    shuffle_block: Annotated[
        int | None, typer.Option(help="Without a state: as in OrderOptions; by default what training computes, too.")
    ] = None,
    columns: Annotated[str | None, typer.Option(metavar="A,B", help="Only these fields.")] = None,
    trust_pickle: TrustPickle = False,
    endpoint_url: EndpointUrl = None,
    storage_options: StorageOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole values, a JSON object per line.")] = False,
) -> None:
    """Print samples: in the order of the index, or what training saw at a position, and where that came from.

    In the order of training, each sample comes with its epoch and position, and the shard and row it lies in:

    \b
    --state ckpt.json             what training gets next
    --state ckpt.json --last 256  the 256 samples just before that
    --state ckpt.json --position 40960 --limit 256
                                  256 samples from another place of the epoch
    --position 40960 --lanes 16 --chunk 32 --shuffle --seed 17
                                  the same without a checkpoint

    With --json tensors are lists, bytes are base64, and NaN and infinities are strings.
    """
    options = _options(endpoint_url, storage_options)
    shape = {"--shuffle": shuffle, "--seed": seed, "--lanes": lanes, "--chunk": chunk, "--shuffle-block": shuffle_block}
    place = {"--position": position, "--last": last, "--epoch": epoch, "--state": state, "--state-path": state_path}
    in_training_order = [flag for flag, value in {**place, **shape}.items() if value is not None]
    if start is not None and in_training_order:
        raise OptionInvalid(f"--start counts in the order of the index, {in_training_order[0]} in that of training")
    from streamshards.cli.show import plain, sample_lines, seen_json, seen_line

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    if not in_training_order:
        from streamshards.convert.reading import read_samples

        samples = read_samples(
            url,
            start=start or 0,
            limit=10 if limit is None else limit,
            columns=names,
            trust_pickle=trust_pickle,
            storage_options=options,
            retry=_RETRY,
        )
        for number, sample in samples:
            if as_json:
                _print_json(plain(sample))
            else:
                typer.echo("\n".join(sample_lines(f"sample {number:,}", sample)))
        return
    from streamshards.convert.replay import Access, first_state, in_epoch, read_seen, span
    from streamshards.convert.states import chosen_state, read_states

    access = Access(storage_options=options, retry=_RETRY, trust_pickle=trust_pickle)
    if state is not None:
        _require_no_shape(shape)
        stood = chosen_state(read_states(state), file=state, path=state_path)
    else:
        order = _order_of_words(shape)
        stood = first_state(url, order=order, seed=seed or 0, shuffle=bool(shuffle), access=access)
    stood = in_epoch(stood, stood.epoch if epoch is None else epoch)
    most = 10 if limit is None and last is None else limit
    positions = span(stood, position=position, last=last, limit=most)
    for seen, sample in read_seen(url, stood, positions, columns=names, access=access):
        if as_json:
            _print_json({"key": seen_json(seen), **plain(sample)})
        else:
            typer.echo("\n".join(sample_lines(seen_line(seen), sample)))


@state_app.command("show")
def show_state(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help='JSON, or of torch.save; "-" is JSON from standard input.')
    ],
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Also check whether the state fits the dataset there.")
    ] = None,
    endpoint_url: EndpointUrl = None,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Show where a checkpoint stands: epoch, position, order, dataset. Finds states however deep they lie in FILE.

    With --url, exit with 6 unless one of them can be gone on from with the dataset there.
    """
    options = _options(endpoint_url, storage_options)
    from streamshards.cli.show import state_json, state_lines
    from streamshards.convert.replay import Access, check_fit
    from streamshards.convert.states import read_states

    access = Access(storage_options=options, retry=_RETRY)
    found = [(each, None if url is None else check_fit(url, each.state, access=access)) for each in read_states(file)]
    if as_json:
        _print_json({"file": file, "states": [state_json(each, fit) for each, fit in found]})
    else:
        typer.echo("\n\n".join("\n".join(state_lines(file, each, fit)) for each, fit in found))
    if url is not None and not any(fit.fits for _, fit in found if fit is not None):
        raise typer.Exit(ExitCode.MISMATCH)


@app.command()
def verify(
    url: Url,
    threads: Annotated[int | None, typer.Option(help="Shards checked at once; by default 2 to 8.")] = None,
    orphans: Annotated[bool, typer.Option("--orphans", help="List objects that the index does not name.")] = False,
    trust_pickle: TrustPickle = False,
    endpoint_url: EndpointUrl = None,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Fetch, hash and decode every shard; list the bad ones and exit with 1 if there are any."""
    options = _options(endpoint_url, storage_options)
    from streamshards.cli.show import verified_json, verified_lines
    from streamshards.convert.checking import verify as do_verify

    with progress_bar("verifying") as progress:
        found = do_verify(
            url,
            threads=threads,
            orphans=orphans,
            trust_pickle=trust_pickle,
            storage_options=options,
            retry=_RETRY,
            progress=progress,
        )
    if as_json:
        _print_json(verified_json(found))
    else:
        typer.echo("\n".join(verified_lines(found)))
    if found.bad:
        raise typer.Exit(ExitCode.BAD_SHARDS)


@cache_app.command("info")
def show_cache(directory: CacheDirectory = None, as_json: Json = False) -> None:
    """Show where the cache of this user lies, and what is in it."""
    from streamshards.cli.show import cache_json, cache_lines
    from streamshards.convert.caching import look

    info = look(directory)
    if as_json:
        _print_json(cache_json(info))
    else:
        typer.echo("\n".join(cache_lines(info)))


@cache_app.command("clear")
def clear_cache(directory: CacheDirectory = None, as_json: Json = False) -> None:
    """Remove every entry of this user. Safe while training runs: it reads on, and fetches what it needs again."""
    from streamshards.cli.show import counted, human_bytes
    from streamshards.convert.caching import clear

    removed = clear(directory)
    if as_json:
        _print_json({"directory": removed.home, "entries": removed.num_entries, "bytes": removed.nbytes})
    else:
        typer.echo(f"removed {counted(removed.num_entries, 'shard')}, {human_bytes(removed.nbytes)}")


@cache_app.command("verify")
def verify_cache(directory: CacheDirectory = None, as_json: Json = False) -> None:
    """Read every entry; remove the damaged ones, list them, and exit with 1 if there were any."""
    from streamshards.cli.show import counted
    from streamshards.convert.caching import check

    checks = check(directory)
    bad = [each for each in checks if each.error is not None]
    if as_json:
        found = [{"path": str(each.path), "error": each.error} for each in bad]
        _print_json({"entries": len(checks), "bad": found})
    else:
        for each in bad:
            typer.echo(f"bad  {each.path}: {each.error}")
        ending = f"{len(bad):,} bad, removed" if bad else "all good"
        typer.echo(f"{counted(len(checks), 'shard')}, {ending}")
    if bad:
        raise typer.Exit(ExitCode.BAD_SHARDS)


def _require_no_shape(shape: Mapping[str, object]) -> None:
    """Check that nothing is said of the order's shape: a state brings it.

    Raises:
        OptionInvalid: Something is.
    """
    said = [flag for flag, value in shape.items() if value is not None]
    if said:
        raise OptionInvalid(f"{', '.join(said)}: the --state says it; leave it out")


def _order_of_words(shape: Mapping[str, int | None]) -> OrderOptions:
    """Return the order that the flags in *shape* ask for.

    Raises:
        OptionInvalid: They leave it open.
    """
    missing = [flag for flag in ("--lanes", "--chunk") if shape[flag] is None]
    if missing:
        raise OptionInvalid(
            f"the order of training needs {' and '.join(missing)}: it depends on the ranks, workers and batch size of "
            'the first start. A checkpoint has them: use --state FILE, or look with "streamshards state show FILE"'
        )
    if shape["--seed"] is not None and not shape["--shuffle"]:
        raise OptionInvalid("--seed means nothing without --shuffle")
    return OrderOptions(lanes=shape["--lanes"], chunk=shape["--chunk"], shuffle_block=shape["--shuffle-block"])


def _options(endpoint_url: str | None, text: str | None) -> dict[str, Any] | None:
    """Return the storage options that two flags ask for, or None."""
    try:
        options = {} if text is None else json.loads(text)
    except ValueError as error:
        raise OptionInvalid(f"--storage-options is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise OptionInvalid(f"--storage-options must be a JSON object, not {type(options).__name__}")
    if endpoint_url is not None:
        options["endpoint_url"] = endpoint_url
    return options or None


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
