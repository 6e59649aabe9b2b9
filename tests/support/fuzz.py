"""Fuzzing of every reader of files by atheris, which looks for bytes that take new paths through the package: `make fuzz`.

A find is an exception that no reader is documented to raise, an error that names no file, more than 20 s or 4 GiB. It ends the
run of its reader and stays in FOLDER/finds; `fuzz.py --reader NAME --only FIND` shows it again.
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["samerge_ext", "yaml"]):
    from readers import READERS

OPTIONS = ("-timeout=20", "-rss_limit_mb=4096", "-max_len=16384", "-print_final_stats=1", "-verbosity=0")
WORDS = (
    b'"', b"{}", b"[]", b": ", b", ", b"&a ", b"*a", b"<<", b"!!", b"null", b"true", b"1e999", b"-1", b"9" * 20, b"\\ud800",
    b"\\u0000", b"F32", b"F4", b"BOOL", b'"shape": []', b'"data_offsets": [0, 0]', b'"__metadata__": {}', b"(.*", b")+",
    b"{0,9}", b"../", b"~",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="for all readers together")
    parser.add_argument("--folder", type=Path, default=Path(".cache-fuzz"), help="of the corpus, which later runs begin from")
    parser.add_argument("--reader", choices=READERS, help="this one alone")
    parser.add_argument("--only", type=Path, help="a find to look at")
    given = parser.parse_args()
    if given.reader:
        fuzz(given.reader, given.folder, given.seconds, given.only)
    failed = []
    for name in READERS:
        print(f"== {name}", flush=True)
        if not (child := os.fork()):  # with the package imported, which takes longer where it is instrumented
            fuzz(name, given.folder, max(1, given.seconds // len(READERS)), None)
        if os.waitpid(child, 0)[1]:
            failed.append(name)
    sys.exit(f"finds of {', '.join(failed)}: {given.folder / 'finds'}" if failed else 0)


def fuzz(name: str, folder: Path, seconds: int, only: Path | None) -> None:
    reader, place = READERS[name], Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus, finds, stem = folder / "corpus" / name, folder / "finds", name.replace(" ", "-").replace("'", "")
    for path in (corpus, finds):
        path.mkdir(parents=True, exist_ok=True)
    sound = reader.sound(place)
    for number, data in enumerate(sound):
        (corpus / f"sound-{number}").write_bytes(data)
    words = folder / "words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in WORDS))
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"

    def one(data: bytes) -> None:
        reader.check(place, data)
        if reader.frame is not None:  # a fuzzer does not find the right length of a header
            reader.check(place, reader.frame(data, sound[0]))

    arguments = [str(only)] if only else [f"-max_total_time={seconds}", f"-dict={words}", str(corpus)]
    atheris.Setup([sys.argv[0], *OPTIONS, f"-artifact_prefix={finds}/{stem}-", *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
