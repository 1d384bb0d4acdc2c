"""The documentation: it builds without a warning, names every option and every result field."""

import functools
import http.server
import json
import logging
import os
import re
import shlex
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
from PIL import Image

from abm_vision.initializers import INITIALIZERS
from abm_vision.tune import __main__ as tune
from abm_vision.vtab import __main__ as vtab
from nlp_ext.glue import __main__ as glue
from nlp_ext.instruct import __main__ as instruct
from nlp_ext.instruct.data import Tokens

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "docs" / "results.md").read_text()


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.code = set()
        self.inside = False

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "code"

    def handle_data(self, data):
        if self.inside:
            self.code |= set(re.split(r"[,\s]+", data))
            self.inside = False


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages; the build must not warn (what mkdocs calls strict)."""
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    logging.getLogger("mkdocs").removeHandler(handler)
    assert warnings == []
    return folder


@pytest.fixture(scope="module")
def served(site):
    """Where the pages are served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def search(served, browser):
    """The pages that the site's own search finds for some words, best first."""
    page = browser.new_page()

    def answers(words):
        page.goto(f"{served}?{urlencode({'q': words})}")  # what the search's own links look like
        page.locator(".md-search-result__meta", has_text="matching document").wait_for()  # also "No matching documents"
        links = [
            item.locator("> a").first.get_attribute("href") for item in page.locator("li.md-search-result__item").all()
        ]
        return [urlsplit(link).path.strip("/") for link in links]

    yield answers
    page.close()


def code(page):
    found = _Text()
    found.feed(page.read_text())
    return found.code


COMMANDS = {tune: ("", "predict", "evaluate"), vtab: ("", "suite"), glue: ("",), instruct: ("", "mt-bench")}


@pytest.mark.slow
@pytest.mark.parametrize(("program", "command"), [(p, command) for p, found in COMMANDS.items() for command in found])
def test_every_option_is_there(site, program, command):
    actions = program.COMMANDS[command].parser()._actions
    flags = {flag for action in actions for flag in action.option_strings} - {"-h", "--help"}
    assert flags <= code(site / "commands" / "index.html")


def test_commands_of_a_cluster_have_flags_that_exist():
    page = (ROOT / "docs" / "clusters.md").read_text()
    calls = re.findall(r"^python -m abm_vision\.vtab (\w+) (.+)$", page, re.MULTILINE)
    calls += [("suite", words) for words in re.findall(r"sbatch examples/suite\.sbatch (.+)$", page, re.MULTILINE)]
    assert [name for name, _ in calls] == ["list", *["suite"] * 5]
    for name, words in calls:
        vtab.COMMANDS[name].parser().parse_args(shlex.split(words, comments=True))


def test_the_job_array_calls_a_suite(tmp_path):
    """With stand-ins for the scheduler and the environment."""
    for name, text in (("bin/srun", '#!/bin/bash\nprintf "%s\\n" "$@"\n'), ("venv/bin/activate", "")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PROJECT": str(tmp_path)}
    script, words = ROOT / "examples" / "suite.sbatch", ["--tasks", "all", "--seeds", "3"]
    done = subprocess.run(
        ["bash", script, "--tasks", "all", "--seeds", "3"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:4] == ["python", "-m", "abm_vision.vtab", "suite"]
    found = vtab.COMMANDS["suite"].parser().parse_args(words[4:])
    assert (found.tasks, found.seeds, found.out) == ("all", 3, f"{tmp_path}/results")
    assert all(line.startswith("#SBATCH --") for line in script.read_text().splitlines() if "SBATCH" in line)


WORDS = {
    "LoRA timm qkv": "questions",
    "freeze k": "questions",
    "slower than full fine-tuning": "fast_layer",
    "merge": "deploy",
    "ONNX": "deploy",
    "add my own initialisation": "own_initialisation",
    "own images": "own_images",
    "slurm": "clusters",
    "learning rate": "choosing",
    "out of memory": "troubleshooting",
    "holds no folder of a class": "troubleshooting",  # a message that was pasted
    "the model cannot take a batch": "troubleshooting",
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "page"), WORDS.items())
def test_words_that_users_type_lead_to_the_page(search, words, page):
    assert page in search(words)[:3]


@pytest.mark.slow
def test_every_start_is_there(site):
    assert set(INITIALIZERS) <= code(site / "concepts" / "index.html")


@pytest.mark.slow
def test_examples_are_shown(site):
    page = (site / "pipelines" / "index.html").read_text()
    assert page.count("initialize_lora_abm_weights</span><span class=") + page.count("initialize_lora_abm_weights") >= 5


def test_every_field_of_a_result_is_explained(vit_run):
    named = set(re.findall(r"`(\w+)`", RESULTS))
    result = vit_run[2]
    assert set(result) - {"folder"} <= named
    for part in ("test", "weights", "preprocessing", "images_per_second", "environment"):
        assert set(result[part]) <= named
    for path in (ROOT / "benchmarks/results/suite").glob("*/result.json"):
        assert set(json.loads(path.read_text())) <= named


@pytest.mark.slow
def test_fields_of_text_results_are_explained(glue_run):
    named = set(re.findall(r"`(\w+)`", RESULTS))
    result = glue_run[0]
    assert set(result) - {"folder"} <= named
    assert set(result["scores"]["validation"]) - {"accuracy"} <= named
    assert set(Tokens(1, [], 0, 0).record("synthetic")) | {"perplexity", "before", "after"} <= named


@pytest.mark.slow
def test_every_page_fits_a_phone(site, served, browser):
    """Nothing but tables and what notebooks print goes on beyond the window; code wraps."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    beyond = "document.documentElement.scrollWidth - window.innerWidth"
    code = (
        "[...document.querySelectorAll('.md-content :is(pre > code, .highlight-ipynb pre, .jp-RenderedMarkdown pre)')]"
    )
    for path in sorted(site.rglob("index.html")):
        page.goto(served + path.parent.relative_to(site).as_posix() + "/")
        assert page.evaluate(beyond) <= 0, path
        assert page.evaluate(f"{code}.every((e) => e.scrollWidth <= e.clientWidth + 2)"), path
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_goes_on_says_so(served, browser, tmp_path, scheme):
    """Its edge is in shadow until it is scrolled to its end."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(f"{served}states/")
    wide = page.locator(".md-typeset__scrollwrap").first
    assert wide.evaluate("(e) => e.scrollWidth > e.clientWidth + 50")

    def edge():
        """How unlike the two ends of a strip without letters are, at the right edge."""
        wide.screenshot(path=tmp_path / "edge.png")
        strip = np.asarray(Image.open(tmp_path / "edge.png").convert("L"), dtype=float)[-6:-2, -24:].mean(0)
        return abs(strip[-2:].mean() - strip[:2].mean())

    before = edge()
    wide.evaluate("(e) => (e.scrollLeft = e.scrollWidth)")
    page.wait_for_timeout(200)
    assert before > 15 and edge() < 5
    page.close()
