"""What each hostile file does, and what must come of it: the table of the corpus."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from tests.attacks.make import CORPUS


class Case(NamedTuple):
    """Files of one kind. The first row of the table that fits a file is its own."""

    files: str
    """Below ``corpus/``; ``*`` stands for anything."""
    does: str
    ended: str
    """The error's class, or "rows" for exactly the seed's rows: harmless."""
    says: str = ""
    """A regular expression that the error's text must hold."""


PARSED_MiB: Final = 640
"""What the largest index that is read takes as it is inflated, copied and refused."""

_CANNOT: Final = "torch.load cannot read it safely: "
_NAMED: Final = "names must be relative, printable and without '..'"

CASES: Final = (
    Case("*/unchanged*", "nothing: the seed, put together anew", "rows"),
    # indexes
    Case("index/name-homoglyph*", "a name that looks like the shard's", "ShardMissing", "does not have it"),
    Case("index/name-300-bytes*", "a name too long for file systems", "StoreError", "File name too long"),
    Case("index/name-twice*", "one shard twice", "IndexInvalid", "a shard name appears twice"),
    Case("index/name-missing*", "no names", "IndexInvalid", "'name' must be a list"),
    Case("index/name-a-dict*", "names as an object", "IndexInvalid", "'name' must be a list"),
    Case("index/name-short*", "lists of different lengths", "IndexInvalid", "0 shard names but 1 values"),
    Case("index/name-*", "a name outside the dataset, or not for people's eyes", "IndexInvalid", _NAMED),
    Case("index/*-short.json", "lists of different lengths, short digests", "IndexInvalid", "1 shard names|32 hex"),
    Case("index/*-missing.json", "a key is missing, or a part", "IndexInvalid", "must be a list|which is missing"),
    Case("index/*-a-dict.json", "an object for a list", "IndexInvalid", "must be a list, found dict"),
    Case("index/rows-2-48*", "rows that no memory holds", "OptionInvalid", "memory_bytes is 64 MiB"),
    Case("index/rows-many-times*", "rows that no memory holds", "OptionInvalid", "memory_bytes is 64 MiB"),
    Case("index/rows-*", "counts below 0, bool, float, huge, text", "IndexInvalid", "whole numbers from 0 to"),
    Case("index/bytes-*", "sizes below 0, float, huge", "IndexInvalid", "whole numbers from 0 to"),
    Case("index/raw_bytes-*", "sizes below 0, float, huge", "IndexInvalid", "whole numbers from 0 to"),
    Case("index/num_samples-int*", "a sum that is wrong", "IndexInvalid", "add up to 8"),
    Case("index/fingerprint-str*", "a fingerprint of other content", "IndexInvalid", "does not fit the content"),
    Case("index/version-int-2*", "a newer version", "IndexInvalid", "upgrade streamshards"),
    Case("index/version-*", "no version", "IndexInvalid", "is not a version number"),
    Case("index/format-*", "other JSON", "IndexInvalid", "not a streamshards index"),
    Case("index/layout-unknown*", "a layout that does not exist", "OptionInvalid", "is not one of auto, shard"),
    Case("index/writer-*", "text that is no Unicode", "IndexInvalid", "not Unicode"),
    Case("index/digest-*", "no digests", "IndexInvalid", "32 hex digits"),
    Case("index/schema-dims-huge*", "a row of 2**64 bytes", "OptionInvalid", "memory_bytes is 64 MiB"),
    Case("index/schema-list*", "a schema that is a list", "IndexInvalid", "'schema' must be a dict"),
    Case("index/schema-*", "sizes that overflow, unknown dtypes, NUL", "IndexInvalid", "schema: "),
    Case("index/pointer-*", "a pointer to elsewhere", "IndexInvalid", "which is no part of an index"),
    Case("index/key-twice*", "two values for one key", "IndexInvalid", "a key stands twice"),
    Case("index/bomb.json.zst", "1.5 GiB in 49 KB, no size told", "IndexInvalid", "inflates to more than the"),
    Case("index/bomb-declared*", "a declared size of 10 GB", "IndexInvalid", "inflates to 10,000,000,000 bytes"),
    Case("index/bomb-of-*", "200 MiB of spaces, 128 MiB of brackets", "IndexInvalid", "inflates to"),
    Case("index/cut*", "a cut frame", "IndexInvalid", "truncated"),
    Case("index/utf16*", "JSON in UTF-16", "rows"),
    Case("index/nested*", "30,000 lists, 10,000 objects in each other", "IndexInvalid", "recursion depth"),
    Case("index/lists*", "thousands of lists", "IndexInvalid", "'shards' must be a dict"),
    Case("index/digits*", "a number of 5,000 digits", "IndexInvalid", "not JSON"),
    Case("index/not-utf8*", "bytes that are no text", "IndexInvalid", "not JSON"),
    Case("index/empty*", "nothing", "IndexInvalid", "not JSON"),
    Case("index/html*", "a proxy's error page", "IndexInvalid", "not JSON"),
    Case("index/pickle*", "a pickle that runs a command", "IndexInvalid", "not JSON"),
    Case("index/*", "a value of the wrong type", "IndexInvalid", "must be an? "),
    # shards: all checksums and the index's digest are right
    Case("shard/pickle-in-payload*", "the .pt file inside runs a command when unpickled", "rows"),
    Case("shard/bomb*", "1 GiB of zeros behind the columns", "ShardCorrupt", "inflates to 1,073,747,897 bytes"),
    Case("shard/frame-larger*", "a frame of 1 GiB that says 128 bytes", "ShardCorrupt", "do not decode|gave"),
    Case("shard/frames-of-no-bytes*", "1,000 empty frames", "ShardCorrupt", "declares 0 bytes"),
    Case("shard/rows-of-nothing*", "2**31 rows without a byte", "ShardCorrupt", "8 rows promised"),
    Case("shard/rows-5000*", "a number of 5,000 digits", "ShardCorrupt", "not JSON"),
    Case("shard/rows-*", "rows: 2**62, -1, true, 8.0", "ShardCorrupt", "directory: rows "),
    Case("shard/dims-*", "shapes whose product overflows, 5,000 dims", "ShardCorrupt", "tensor with shape"),
    Case("shard/directory-deep*", "20,000 lists in each other", "ShardCorrupt", "recursion depth"),
    Case("shard/directory-of-lists*", "15,000 lists", "ShardCorrupt", "directory: keys"),
    Case("shard/directory-nan*", "NaN rows", "ShardCorrupt", "rows nan"),
    Case("shard/offset-*", "offsets below 0, beyond the file, unaligned", "ShardCorrupt", "directory: field 'x'"),
    Case("shard/tensors-overlap*", "two tensors over each other", "ShardCorrupt", "overlap"),
    Case("shard/column-*", "columns twice, missing, unknown", "ShardCorrupt", "stand twice|no offsets|does not have"),
    Case("shard/dtype-of-another*", "another dtype than the schema's", "ShardCorrupt", "not float32"),
    Case("shard/dtype-*", "dtypes that do not exist", "ShardCorrupt", "is not one of bool"),
    Case("shard/version-2*", "a newer version", "ShardCorrupt", "version 2; this release reads version 1"),
    Case("shard/key-unknown*", "a key too many", "ShardCorrupt", "directory: keys"),
    Case("shard/columns-a-dict*", "an object for a list", "ShardCorrupt", "directory: keys"),
    Case("shard/schema-a-list*", "a list for an object", "ShardCorrupt", "an object was expected"),
    Case("shard/field-is-a-dict-too*", "a field inside a field", "ShardCorrupt", "both a value and a dict"),
    Case("shard/path-*", "keys: 65 deep, with NUL", "ShardCorrupt", "a path of 65|holds a NUL"),
    Case("shard/not-json*", "a directory of no JSON", "ShardCorrupt", "not JSON"),
    Case("shard/table-raw-size-huge*", "a seek table that says 4 GiB", "ShardCorrupt", "inflates to|declares"),
    Case("shard/table-no-entry*", "a seek table of nothing", "ShardCorrupt", "no seek table"),
    Case("shard/table-count-lies*", "2**32 - 1 frames", "ShardCorrupt", "no seek table"),
    Case("shard/table-reserved*", "reserved bits", "ShardCorrupt", "no seek table"),
    Case("shard/table-*", "a seek table that lies", "ShardCorrupt", "accounts|declares|different|no zstd frame"),
    Case("shard/skippable-first*", "a skippable frame at the start", "ShardCorrupt", "accounts for|no zstd frame"),
    Case("shard/two-shards*", "a shard behind a shard", "ShardCorrupt", "accounts for"),
    Case("shard/cut*", "a cut shard", "ShardCorrupt", "no seek table"),
    Case("shard/empty*", "nothing", "ShardCorrupt", "no seek table"),
    Case("shard/frame-with*", "no checksum, a dictionary, a vast window", "ShardCorrupt", "frame"),
    Case("shard/offsets-*", "offsets that fall, or end elsewhere", "ShardCorrupt", "offsets do not rise"),
    Case("shard/shapes-*", "shapes that contradict the offsets", "ShardCorrupt", "contradict"),
    Case("shard/bool-2*", "a bool of 2", "ShardCorrupt", "bytes other than 0 and 1"),
    Case("shard/text-no-utf8*", "text that is no UTF-8", "ShardCorrupt", "does not decode"),
    Case("shard/json-broken*", "JSON that does not parse", "ShardCorrupt", "does not decode"),
    # foreign files: code
    Case("foreign/inst*", "INST os.system", "ShardCorrupt", _CANNOT + "pickle: .* opcode 0x69"),
    Case("foreign/obj*", "OBJ os.system", "ShardCorrupt", _CANNOT + "pickle: .* opcode 0x6f"),
    Case("foreign/stack-global*", "STACK_GLOBAL os.system", "ShardCorrupt", _CANNOT + "pickle: .* opcode 0x93"),
    Case("foreign/ext*", "EXT1", "ShardCorrupt", _CANNOT + "pickle: .* opcode 0x82"),
    Case("foreign/legacy-module*", "the old id of a module's source", "ShardCorrupt", "what is no storage"),
    Case("foreign/*system*", "os.system", "UnsafePickle", r"needs (os|posix)\.system"),
    Case("foreign/plain-pickle*", "os.system in a bare pickle", "UnsafePickle", r"needs os\.system"),
    Case("foreign/typed-os*", "os.system behind torch's own function", "UnsafePickle", r"needs os\.system"),
    Case("foreign/eval*", "builtins.eval", "UnsafePickle", r"needs builtins\.eval"),
    Case("foreign/getattr*", "builtins.getattr", "UnsafePickle", "needs builtins.getattr"),
    Case("foreign/import*", "importlib.import_module", "UnsafePickle", "needs importlib"),
    Case("foreign/subprocess*", "subprocess.check_output", "UnsafePickle", "needs subprocess"),
    Case("foreign/torch-*", "torch.load, hub.load, save, from_file", "UnsafePickle", r"needs torch\."),
    Case("foreign/storage-from-file*", "a storage of a file's bytes", "UnsafePickle", "UntypedStorage"),
    # foreign files: memory
    Case("foreign/bytearray*", "bytearray(2 GiB)", "ShardCorrupt", "a bytearray by its length"),
    Case("foreign/tensor-by-size*", "torch.Tensor(2**29)", "UnsafePickle", r"needs torch\.Tensor"),
    Case("foreign/tensor-class-by-size*", "torch.FloatTensor(2**29)", "UnsafePickle", "FloatTensor"),
    Case("foreign/tensor-build*", "an old tensor's state", "UnsafePickle", r"needs torch\.Tensor"),
    Case("foreign/storage-*by-size*", "torch.UntypedStorage(2 GiB)", "UnsafePickle", "UntypedStorage"),
    Case("foreign/tensor-negative*", "a size below 0", "ShardCorrupt", "sizes below zero"),
    Case("foreign/tensor-expanded*", "32 bytes as 16 GiB", "ShardCorrupt", "would become far more"),
    Case("foreign/tensor-shared*", "a tensor in 20,000 places", "ShardCorrupt", "not what the index was made from"),
    Case("foreign/tensor-*", "a tensor larger than its storage", "ShardCorrupt", "ends beyond the 32 bytes"),
    Case("foreign/storage-negative*", "a storage below 0", "ShardCorrupt", "without a name or a size"),
    Case("foreign/storage-*", "a storage that the zip does not have", "ShardCorrupt", "has no record of that size"),
    Case("foreign/laughs*", "10**20 strings in 908 bytes", "ShardCorrupt", "would become far more"),
    Case("foreign/itself*", "a list that holds itself", "ShardCorrupt", "would become far more"),
    Case("foreign/methods-hidden*", "a dict whose keys() is hidden by a number", "rows"),
    Case("foreign/deep*", "30,000 lists in each other", "ShardCorrupt", "not what the index was made from"),
    Case("foreign/marks*", "60,000 marks", "ShardCorrupt", "containers in each other"),
    Case("foreign/codec*", "a codec that takes for ever", "ShardCorrupt", "an encoding"),
    Case("foreign/legacy-storage*", "a storage of 2 GiB without its bytes", "ShardCorrupt", "more than the file holds"),
    Case("foreign/legacy-view*", "a part of a storage that is not in it", "ShardCorrupt", "that is not in it"),
    Case("foreign/zst-bomb*", "1 GiB in 32 KB", "ShardCorrupt", "inflates to 1,073,741,824 bytes"),
    # foreign files: the zip
    Case("foreign/zip-bomb*", "a record that inflates", "ShardCorrupt", "a compressed record"),
    Case("foreign/zip-version-bomb*", "a version of 2 GiB", "ShardCorrupt", "records of 2,147,483,"),
    Case("foreign/zip-record-huge*", "a record of 2 GiB without its bytes", "ShardCorrupt", "records of 2,147,483,"),
    Case("foreign/zip-overlap*", "300 records over each other", "ShardCorrupt", "cut, or they overlap"),
    Case("foreign/zip-dotdot*", "a record named ../", "ShardCorrupt", "a record named '.*\\.\\./"),
    Case("foreign/zip-tw*", "a record twice, in two folders, two ends", "ShardCorrupt", "stands twice|where its end"),
    Case("foreign/zip-directory*", "a directory elsewhere", "ShardCorrupt", "where its end says"),
    Case("foreign/zip-comment*", "an end in the comment", "ShardCorrupt", "where its end says"),
    Case("foreign/zip-nothing*", "no records", "ShardCorrupt", _CANNOT),
    Case("foreign/zip-no-pickle*", "no pickle", "ShardCorrupt", _CANNOT),
    Case("foreign/zip-byteorder*", "an unknown byte order", "ShardCorrupt", "endianness"),
    Case("foreign/cut*", "a cut file", "ShardCorrupt", "truncated"),
    Case("foreign/empty*", "nothing", "ShardCorrupt", _CANNOT),
    # states
    Case("state/seed-2-63-1*", "another seed", "ResumeMismatch", "seed is 0 here"),
    Case("state/chunk-2-63-1*", "chunks of 2**63 - 1: the order of a fresh run", "rows"),
    Case("state/shuffle_block-2-63-1*", "a block of 2**63 - 1: all of it", "rows"),
    Case("state/keys-many*", "3,000 keys of somebody else's", "rows"),
    Case("state/*", "a state of something else, or of nothing", "ResumeMismatch", "state"),
)


def names() -> list[str]:
    """Return the files of the corpus."""
    return sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file())


def case_of(name: str) -> Case:
    """Return the row of the table for that file."""
    return next(case for case in CASES if fnmatchcase(name, case.files))
