"""Reports of two small merges and of both side by side, looked at in a headless Chromium: `make check-pages`.

In light and dark, wide and narrow, nothing may be on the console, nothing loaded, nothing wider than the window, and axe-core may
find nothing; html-validate must find nothing either. Screenshots are kept in the folder given.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import classifiers
import yaml

HERE = Path(__file__).parent
TEXTS = {"mood": "mood.txt", "topic": "topic.jsonl"}


def samerge(*arguments: object) -> None:
    program = "from samerge_ext.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True)


def write_pages(root: Path) -> list[Path]:
    classifiers.write(root)
    files = {task: str(root / name) for task, name in TEXTS.items()}
    folders = []
    for name, parameters in {"merged": {}, "plain": {"sam": "off"}}.items():
        recipe = {
            "merge_method": "samerging",
            "base_model": str(root / "base"),
            "models": [str(root / task) for task in TEXTS],
            "heads": ["classifier.*"],
            "calibration": {"files": files, "batch_size": 1},
            "parameters": {"steps": 60, "learning_rate": 0.01, "held_back": 0.25, **parameters},
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        folders.append(root / name)
        samerge("merge", root / f"{name}.yaml", folders[-1], "--overwrite")
        samerge("report", folders[-1], "--similarity", "--loss-slice")
    samerge("compare", *folders, "--html", root / "both.html")
    return [folders[0] / "report.html", root / "both.html"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for models, pages and screenshots")
    parser.add_argument("--node-modules", type=Path, required=True, help="with playwright-core, axe-core and html-validate")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pages = [str(page.resolve()) for page in write_pages(arguments.folder)]
    modules = arguments.node_modules.resolve()
    subprocess.run([modules / ".bin" / "html-validate", "--preset=standard", *pages], check=True)
    shots = arguments.folder.resolve()
    subprocess.run(["node", HERE / "report_pages.mjs", modules, arguments.chromium, shots, *pages], check=True)


if __name__ == "__main__":
    main()
