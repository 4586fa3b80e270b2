"""What the site needs beyond its plugins: the tour's pages, run and drawn; formulas as MathML.

A page of the tour is a Python file in percent cells. Building runs it once, in this process, and
puts what each cell prints and shows below the cell. MathML needs no script and no network.
"""

import contextlib
import html
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from latex2mathml.converter import convert  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from mkdocs.structure.files import File, InclusionLevel  # noqa: E402


def on_files(files, config):
    """Each docs/tour/NAME.py becomes tour/NAME.md and its figures."""
    for path in sorted(Path(config.docs_dir, "tour").glob("*.py")):
        source = files.src_uris.get(f"tour/{path.name}")
        if source is not None:
            source.inclusion = InclusionLevel.EXCLUDED
        text, figures = run(path)
        files.append(File.generated(config, f"tour/{path.stem}.md", content=text))
        for name, content in figures.items():
            files.append(File.generated(config, f"tour/{name}", content=content))
    return files


def on_page_markdown(markdown, **_):
    """Links lead to the tour's Python files, which are there without a build; here to its pages."""
    return re.sub(r"\((tour/\w+)\.py\)", r"(\1.md)", markdown)


def cells(text: str):
    """(is it prose, its text) of each cell of a percent file."""
    for cell in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            yield True, re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()
        else:
            yield False, body.strip()


def run(path: Path) -> tuple[str, dict[str, bytes]]:
    """A page as Markdown, and its figures as PNG, by file name."""
    parts = ["---\nhide: [toc]\n---"]  # one heading a page: the room is for code and figures
    figures: dict[str, bytes] = {}
    scope = {"__name__": "__main__", "__file__": str(path)}

    def show():
        for number in plt.get_fignums():
            content = io.BytesIO()
            plt.figure(number).savefig(content, format="png", dpi=200)
            name = f"{path.stem}_{len(figures) + 1}.png"
            title = " · ".join(a.get_title(loc="left") for a in plt.figure(number).axes)
            figures[name] = content.getvalue()
            parts.append(f"![{title}]({name})")
        plt.close("all")

    before, plt.show = plt.show, show
    try:
        with matplotlib.rc_context():
            for prose, text in cells(path.read_text(encoding="utf-8")):
                if prose:
                    parts.append(text)
                    continue
                parts.append(f"```python\n{text}\n```")
                place, printed = len(parts), io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(text, str(path), "exec"), scope)
                if printed.getvalue():
                    parts.insert(place, f'```text title="prints"\n{printed.getvalue()}```')
    finally:
        plt.show = before
    return "\n\n".join(parts) + "\n", figures


def on_page_content(content, **_):
    """arithmatex leaves \\(…\\) and \\[…\\] in elements of its own; MathML takes their place."""

    def formula(match):
        text = html.unescape(match[2]).strip()
        display = "block" if text.startswith("\\[") else "inline"
        return convert(text[2:-2].strip(), display=display)

    pattern = r'<(span|div) class="arithmatex">(.*?)</\1>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)
