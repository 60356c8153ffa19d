"""Table 1: benchmarks x frames x models, measured beside the published figures.

    bash train.sh table START runs/grpo runs/7b --data DIR
    bash train.sh table --toy                   the same on the toy's checkpoints, in two minutes

A model is a run (its RUN/final), a checkpoint's folder or a hub name. DIR is what `bash train.sh
data DIR --benchmarks` fills: eval_BENCHMARK.json, whose paths start from DIR. evaluate.py answers,
over all GPUs, what is not answered yet (OUT/MODEL/BENCHMARK-FRAMES/predictions.jsonl), with all
other options that are given (--protocol video-r1, --batch 16 ..). Then OUT/table.md, .json, .svg,
.png: scores with Wilson's 95% intervals, published figures of the same cell, and the last model
minus each other with paired intervals. A benchmark that is missing is named, and the rest goes on.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import logging

import evaluate
from lab import download, toy
from lab.predictions import read_predictions, settings_of
from lab.protocols import BENCHMARKS, PROTOCOLS, read_questions
from lab.report import COLOURS
from lab.scores import difference, published_figures, summarise, wilson
from prompt import BadRecord

ROOT = Path(__file__).resolve().parent.parent
PAPER = ["video-holmes", "videommmu", "mmvu", "tempcompass", "videomme"]
BROUGHT = "`bash train.sh data DIR --benchmarks` brings it"
ELSEWHERE = {       # what that does not bring
    "video-holmes": f"{BROUGHT}, but for its clips: {download.HOLMES}",
    "mvbench": "list: Video-R1/Video-R1-eval on the hub; clips: OpenGVLab/MVBench",
    "vsibench": "list: Video-R1/Video-R1-eval on the hub; clips: nyu-visionx/VSI-Bench"}
SECONDS = (0.065, 0.005)    # a question and each frame, on an H100, 360 tokens: docs/speed.md
TOY = ["--max_new_tokens", "64", "--batch", "100", "--dtype", "float32", "--workers", "1"]
KEPT = ("row", "path", "problem", "problem_type", "solution", "grade", "unreadable")


# ------------------------------------------------------------------------------------------ what is
def checkpoint_of(name: str) -> str:
    """The folder of a run's final weights, a checkpoint's own, or a name that the hub or its cache
    knows: "runs/7b" looks like one. SystemExit if it is none of these."""
    for folder in (Path(name, "final"), Path(name)):
        if (folder / "config.json").is_file():
            return str(folder.resolve())
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SystemExit(f"error: {name}: no run that has ended (final/), no checkpoint, no hub "
                         "name; a run's checkpoint-* can be given too")
    try:
        hf_hub_download(name, "config.json")
    except (HTTPError, OSError, ValueError) as error:
        raise SystemExit(f"error: {name}: no run or checkpoint here, and not from the hub either: "
                         f"{download.first_line(error)}") from None
    return name


def labels(names: list[str]) -> list[str]:
    """Short names that tell the models apart."""
    short = [Path(name.removesuffix("/final")).name for name in names]
    return short if len(set(short)) == len(names) else [name.replace("/", "-") for name in names]


class Cell:
    """A model's answers to a benchmark at a number of frames."""

    def __init__(self, label: str, model: str, benchmark: str, frames: int, a: argparse.Namespace):
        self.label, self.benchmark, self.frames = label, benchmark, frames
        self.out = a.out / label / f"{benchmark}-{frames}"
        data = a.data / ("test.json" if a.toy else f"eval_{benchmark}.json")
        self.arguments = [
            "--model", model, "--benchmark", benchmark, "--frames", str(frames), "--data",
            str(data), "--videos", str(a.data), "--out", str(self.out), *a.more]
        asked = evaluate.parse(self.arguments)
        records = read_questions(data, asked.protocol, benchmark)
        self.rows, self.n, self.settings = [], len(records), settings_of(asked, records)
        self.absent = {r["row"] for r in records if not (a.data / r["path"]).is_file()}
        self.half = sum("question_only" in r["path"] for r in records)
        self.left = self.read()

    def __str__(self) -> str:
        return f"{self.benchmark}, {self.frames} frames, {self.label}"

    def read(self) -> int:
        """Take up the answers that are there; how many questions are left. One whose clip could
        not be read is not left, unless the clip was missing and is there now."""
        try:
            settings, rows = read_predictions(self.out / "predictions.jsonl")
        except (OSError, BadRecord):            # none yet, or a line is cut: evaluate.py mends it
            return self.n
        if any(settings.get(name) != value for name, value in self.settings.items()):
            return self.n                       # evaluate.py will refuse, and say why
        self.rows = [{name: row[name] for name in KEPT if name in row} for row in rows]
        return self.n - sum("grade" in row or row["row"] in self.absent
                            or not row["unreadable"].endswith("no such file") for row in rows)

    def answer(self, gpus: int) -> None:
        """Run evaluate.py; CalledProcessError if it fails."""
        command = [sys.executable]
        if gpus > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        command += [str(ROOT / "evaluate.py"), *self.arguments]
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "report.txt", "w") as report:
            with subprocess.Popen(command, stdout=report) as child:
                try:
                    code = child.wait()
                finally:
                    child.terminate()           # where this is ended; torchrun hands it on
        if code:
            raise subprocess.CalledProcessError(code, command)
        self.left = self.read()

    def result(self) -> dict | None:
        """{"score", "interval", counts, "published"}; None without answers. The published figures
        were sampled at 0.1, so nearly greedily: they stand beside whatever sampling."""
        s, protocol = summarise(self.rows), PROTOCOLS[self.settings["protocol"]]
        if s["n"] == 0:
            return None
        usual = {name: protocol["options"][name] for name in ("temperature", "top_p")}
        published = published_figures({**self.settings, **usual})
        if published:
            same_data = protocol["same_data"].get(str(self.frames), {})
            published = {**published, **same_data.get(self.benchmark, {})}
        score = s[protocol["score"]]
        return {"score": score, "interval": wilson(score, s["n"]), "n": s["n"],
                "questions": self.n, "unreadable": s["unreadable"], "unparsed": s["unparsed"],
                "published": published}


# ---------------------------------------------------------------------------------------- the table
def table_of(cells: list[Cell]) -> list[dict]:
    """A row for each benchmark and number of frames: "scores" {model: result}, "published"
    {model: figure}, "differences" {"last - other": difference and interval}."""
    table = []
    for key in dict.fromkeys((cell.benchmark, cell.frames) for cell in cells):
        *others, last = (cell for cell in cells if (cell.benchmark, cell.frames) == key)
        scores = {cell.label: cell.result() for cell in (*others, last)}
        name, differences = PROTOCOLS[last.settings["protocol"]]["score"], {}
        for cell in others:
            found = difference(last.rows, cell.rows)
            differences[f"{last.label} - {cell.label}"] = found and {"n": found["n"], **found[name]}
        published = next((s["published"] for s in scores.values() if s), {})
        table.append({"benchmark": key[0], "frames": key[1], "scores": scores,
                      "published": published, "differences": differences})
    return table


def columns(table: list[dict], name: str) -> list[str]:
    return list(dict.fromkeys(x for row in table for x in row[name]))


def markdown(table: list[dict]) -> str:
    """The table with its columns aligned: it reads as text, too."""
    models, published, pairs = (columns(table, x) for x in ("scores", "published", "differences"))
    lines = [["benchmark", "frames", *models,
              *(f"published: {x.split(' (')[0]}" for x in published), *pairs]]
    for row in table:
        line = [row["benchmark"], str(row["frames"])]
        for s in map(row["scores"].get, models):
            line.append("{:.1f} ({:.1f} to {:.1f})".format(
                *(100 * x for x in (s["score"], *s["interval"]))) if s else "-")
        line += [str(row["published"].get(x, "-")) for x in published]
        for d in map(row["differences"].get, pairs):
            line.append("{:+.1f} +- {:.1f}".format(100 * d["difference"], 100 * (
                d["interval"][1] - d["difference"])) if d else "-")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def notes(table: list[dict]) -> str:
    """What a reader of the numbers has to know."""
    said = ["- Scores in %, with 95% intervals: Wilson's, which take questions as independent; "
            "those of differences are paired and heed that questions share clips."]
    for row in table:
        for model, s in row["scores"].items():
            odd = {"unreadable": s["unreadable"], "not answered yet": s["questions"] - s["n"]
                   - s["unreadable"], "unparsed": s["unparsed"]} if s else {}
            if any(odd.values()):
                counts = ", ".join(f"{n} {what}" for what, n in odd.items() if n)
                said.append(f"- {row['benchmark']}, {row['frames']} frames, {model}: {counts}, of "
                            f"{s['questions']} questions")
    return "\n".join(said)


def plot(table: list[dict], path: Path) -> None:
    """A panel for each benchmark, scores over frames, as SVG and PNG; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("(for a picture of the table too: pip install matplotlib)")
        return
    names = list(dict.fromkeys(row["benchmark"] for row in table))
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        rows = [row for row in table if row["benchmark"] == name]
        for i, model in enumerate(columns(table, "scores")):
            found = {row["frames"]: s for row in rows if (s := row["scores"][model])}
            panel.plot(list(found), [100 * s["score"] for s in found.values()], marker="o",
                       markersize=3, label=model, color=COLOURS[i % 7])
            for x, s in found.items():
                panel.vlines(x, *(100 * y for y in s["interval"]), color=COLOURS[i % 7], alpha=0.4)
        for i, model in enumerate(columns(table, "published")):
            found = {x["frames"]: y for x in rows if (y := x["published"].get(model))}
            panel.plot(list(found), list(found.values()), linestyle=":", marker="x", markersize=4,
                       label=f"published: {model}", color=COLOURS[::-1][i % 7])
        panel.set_title(name, fontsize=10, loc="left")
        panel.set_xticks([row["frames"] for row in rows])
        panel.set_xlabel("frames")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for kind in (".svg", ".png"):
        figure.savefig(path.with_suffix(kind), dpi=110)
        print(path.with_suffix(kind))


# -------------------------------------------------------------------------------------- the command
def cells_of(models: dict[str, str], a: argparse.Namespace) -> list[Cell]:
    """All that can be measured; what cannot is said, and where it can be had."""
    cells = []
    for benchmark in a.benchmarks:
        wanting = ELSEWHERE.get(benchmark, BROUGHT)
        try:
            here = [Cell(label, model, benchmark, frames, a)
                    for frames in a.frames for label, model in models.items()]
        except (OSError, BadRecord) as error:
            print(f"{benchmark} is left out: {error}; {wanting}")
            continue
        n, absent = here[0].n, len(here[0].absent)
        print(f"{benchmark}: {n} questions of {BENCHMARKS[benchmark]['size'] or n}"
              + (f", {absent} without their clip; {wanting}" if absent else ""))
        if here[0].half:
            print(f"{benchmark}: {here[0].half} clips show only the question (Video-R1 issue 69)")
        if absent < n:
            cells += here
    return cells


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.sh table", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="a run, a checkpoint's folder or a hub name")
    add("--data", type=Path, default=Path("."), help="folder of the lists and their clips")
    add("--benchmarks", nargs="+", choices=[*PAPER, "mvbench", "vsibench"], default=PAPER,
        help="columns of the table (default: the paper's)")
    add("--frames", nargs="+", type=int, help="numbers of frames (default: 16 32 64)")
    add("--out", type=Path, default=Path("runs/table"), help="folder for answers and table")
    add("--toy", action="store_true", help="the toy's benchmark, its cold start and runs/toy")
    a, a.more = parser.parse_known_args(arguments)
    a.frames = a.frames or ([4, 8] if a.toy else [16, 32, 64])
    if a.toy:
        a.data, a.benchmarks, a.more = a.out / "world", ["toy"], TOY + a.more
        own = [ROOT / "cold_start", Path("runs/toy")]
        a.models = a.models or [str(x) for x in own if x == own[0] or (x / "final").exists()]
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if not a.models:
        parser.error("no MODEL is named")
    return a


def write(cells: list[Cell], models: dict[str, str], path: Path) -> tuple[list[dict], str]:
    """Keep the table of what is measured by now, as JSON and Markdown; returns both."""
    table = table_of(cells)
    text = f"{markdown(table)}\n\n{notes(table)}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps({"models": models, "table": table}, indent=1))
    return table, text


def main(arguments: list[str] | None = None) -> None:
    a = parse(arguments)
    logging.set_verbosity_error()                               # no retries one by one
    models = dict(zip(labels(a.models), map(checkpoint_of, a.models)))
    if a.toy and not (a.data / "test.json").exists():
        toy.make(a.data, train=0, test=100)
    download.holmes_list(a.data)
    cells, gpus, failed = cells_of(models, a), torch.cuda.device_count(), 0
    path, todo = a.out / "table.md", [cell for cell in cells if cell.left]
    hours = sum(c.left * (SECONDS[0] + SECONDS[1] * c.frames) for c in todo) / max(1, gpus) / 3600
    where = (f"{gpus} GPUs, in {hours:.1f} hours where they are as fast as an H100 and clips are "
             "decoded in time") if gpus else "the CPU"
    print(f"{sum(cell.left for cell in todo)} questions to answer, in {len(todo)} of {len(cells)} "
          f"cells, on {where}", flush=True)
    for cell in todo:
        print(cell, flush=True)
        try:
            cell.answer(gpus)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"{cell}: evaluate.py ended with exit code {error.returncode}; the rest goes on")
        write(cells, models, path)
    if not any(cell.result() for cell in cells):            # rows can all be unreadable
        raise SystemExit("error: nothing is measured; see above")
    table, text = write(cells, models, path)
    print(f"\n{text}\n{path}\n{path.with_suffix('.json')}")
    plot(table, path)
    if failed:
        raise SystemExit(f"error: {failed} cells failed, see above; the same command tries again")


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):              # evaluate.py is ended with this
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main()
