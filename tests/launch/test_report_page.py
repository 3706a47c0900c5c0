"""The report page: complete, self-contained, right in its numbers, calm about what is missing."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch import report_figures, report_spike_figures
from launch.report_page import SECTIONS, render_report
from tests.launch.report_run import write_raster, write_run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps attributes and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """Cells after the row's heading."""
        return next(row[1:] for row in self.rows if row[0] == first)


def render(run_dir: Path, **options: object) -> tuple[str, Page]:
    text = render_report(run_dir, **options).read_text(encoding="utf-8")  # type: ignore[arg-type]
    return text, Page(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return render(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about words: figures are built but not turned into pictures."""
    for module in (report_figures, report_spike_figures):
        monkeypatch.setattr(module, "image", lambda drawn, description: "<img>")


def test_page_needs_nothing_from_outside(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/svg+xml;base64," if tag == "img" else "#")


def test_every_figure_is_a_whole_picture_with_a_description(whole: tuple[str, Page]) -> None:
    _, page = whole
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    descriptions = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(sources) == len(descriptions) == 9
    assert all(descriptions)
    for source in sources:
        picture = ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
        assert picture.tag.endswith("svg")


def test_links_lead_to_sections_with_headings(whole: tuple[str, Page]) -> None:
    text, page = whole
    links = [value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == [anchor for anchor, _, _ in SECTIONS[1:]]
    anchors = {value for tag, name, value in page.attributes if (tag, name) == ("section", "id")}
    assert set(links) == anchors
    assert "missing" not in re.findall(r'<p class="(\w+)"', text)


def test_comparison_has_the_ratios(whole: tuple[str, Page]) -> None:
    _, page = whole
    words = "hybrid, trained on, spikes off"
    assert page.row("continued") == [words, "10.50", "0.875", "1.050", "9.90", "1.100"]
    assert page.row("converted")[1:] == ["30.00", "2.500", "3.000", "–", "–"]


def test_energy_is_the_reports_formula(whole: tuple[str, Page]) -> None:
    """Mean spikes are 1 in layer 0 and 2 in layer 1: 1.5 x 0.03 pJ."""
    text, page = whole
    assert page.row("spiking: mean spikes × INT8 addition")[0] == "0.0450"
    assert page.row("FP16 multiply-accumulate") == ["1.50", "97.0\u00a0%", "33.3 ×"]
    assert "not a measurement" in text
    assert "memory traffic" in text


def test_spiking_tables(whole: tuple[str, Page]) -> None:
    _, page = whole
    assert page.row("window sparsity")[1:] == ["70.00\u00a0%", "69.15 %"]
    assert page.row("1 ffn_out") == ["3.00", "2.00", "0.222", "0.100", "0.700", "0.950", "0"]
    places = [row[0] for row in page.rows if re.match(r"\d (mixer|ffn)_", row[0])]
    sites = ["mixer_in", "mixer_out", "ffn_in", "ffn_out"]
    assert places == [f"{layer} {site}" for layer in (0, 1) for site in sites]


def test_certificate_and_settings(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert page.row("copied") == ["23"]
    assert page.row("unexplained") == ["0"]
    assert ["0", "0.875", "0.375", "512"] in page.rows
    assert ["0", "7.25", "3.50", "12.5\u00a0%"] in page.rows
    assert "from 12.34 to 43.21" in text
    assert page.row("spiking") == ["adaptive, k = 3.0, from step 29"]
    assert page.row("prepare") == ["11.2"]
    assert re.fullmatch(r"[\d,]+ parameters, hidden 16, .*", page.row("size")[0])


def test_numbers_stand_on_the_right(whole: tuple[str, Page]) -> None:
    text, _ = whole
    assert '<td class="num">10.50</td>' in text
    assert "<td>hybrid, trained on, spikes off</td>" in text
    assert ".num { text-align: right" in text


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("name", "sentence", "remedy"),
    [
        ("metrics.jsonl", "No training steps", "python -m launch.train"),
        ("eval.jsonl", "No held-out loss", "evaluation.interval_steps=N"),
        ("config.yaml", "No configuration", "python -m launch.train"),
        ("summary.json", "No comparison of models", "make quickstart"),
        ("certificate.json", "No certificate", "python -m launch.convert"),
        ("spike_raster.npz", "No spike raster", "python -m launch.report"),
    ],
)
def test_missing_input_is_one_sentence_with_its_command(
    tmp_path: Path, name: str, sentence: str, remedy: str
) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / name).unlink()
    text, _ = render(run_dir)
    notes = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert any(sentence in note and name in note and remedy in note for note in notes)


def test_empty_folder_still_renders(tmp_path: Path) -> None:
    text, page = render(tmp_path)
    assert len(re.findall(r'<p class="missing">', text)) == len(SECTIONS) - 1
    assert not [tag for tag, _, _ in page.attributes if tag == "img"]


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "summary.json", "spike_raster.npz"]
)
def test_damaged_input_is_named(tmp_path: Path, name: str) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / name).write_text("{broken: [\nmore\n")
    text, _ = render(run_dir)
    assert f"{name} cannot be read" in text


@pytest.mark.usefixtures("no_drawing")
def test_a_run_without_spikes_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=20)
    text, _ = render(run_dir)
    for section in ("No spike statistics", "No energy estimate"):
        assert section in text
    assert "no step recorded any" in text
    assert "69.25\u00a0%" in text


@pytest.mark.usefixtures("no_drawing")
def test_numeric_part_of_a_certificate_may_be_skipped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "certificate.json").write_text(json.dumps({"numeric": {"skipped": True}}))
    text, _ = render(run_dir)
    assert "No numeric comparison of source and target" in text


def test_foreign_text_is_escaped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        config.replace("experiment: tiny", 'experiment: "<script>alert(1)</script>"')
    )
    write_raster(run_dir / "spike_raster.npz", ("</p><script>", "$x$", "世界", " ", "\t"))
    text, _ = render(run_dir)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "世界<sub>3</sub>" in text


@pytest.mark.usefixtures("no_drawing")
def test_inputs_may_lie_elsewhere(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    elsewhere = tmp_path / "converted"
    elsewhere.mkdir()
    (run_dir / "certificate.json").rename(elsewhere / "certificate.json")
    (run_dir / "summary.json").rename(tmp_path / "all.json")
    extra = {"certificate": elsewhere, "summary": tmp_path / "all.json"}
    out = tmp_path / "pages" / "page.html"
    text, page = render(run_dir, out=out, extra=extra)
    assert page.row("copied") == ["23"]
    assert page.row("base")[1] == "12.00"
    assert out.read_text(encoding="utf-8") == text
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert not (run_dir / "report.html").exists()


def test_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    assert render(run_dir)[0] == render(run_dir)[0]


def test_refuses_what_it_cannot_find(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir \(.*nowhere\) must be a folder"):
        render_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"extra \(certifcate\) must be among metrics, "):
        render_report(tmp_path, extra={"certifcate": tmp_path})
