"""The report as one HTML page, which needs no other file: on a wide screen and on a phone."""

from __future__ import annotations

import base64
import html
import re

import markdown

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; color: #111; }}
body {{ overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.2; }}
h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
p, ul, figcaption {{ max-width: 50rem; }}
nav {{ font-size: 0.85rem; border: 1px solid #ccc; padding: 0.5rem 1rem; }}
nav ul {{ max-width: none; columns: 17rem; margin: 0; padding-left: 1rem; }}
figure {{ display: inline-block; vertical-align: top; width: 38rem; max-width: 100%; margin: 1rem 0.5rem 1rem 0; }}
img {{ width: 100%; height: auto; display: block; }}
em, figcaption {{ color: #444; font-size: 0.9rem; }}
/* A table that is wider than the screen scrolls by itself: a shadow at its edge shows that, and its first column stays
   in view. A narrow table stands beside the picture before it. */
.wide {{ display: inline-block; vertical-align: top; max-width: 100%; overflow-x: auto; margin: 0.5rem 0;
  background: linear-gradient(to left, #fff 40%, #fff0) right / 3rem 100% no-repeat local,
  linear-gradient(to left, #0004, #0000) right / 0.7rem 100% no-repeat scroll; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.35rem; border-bottom: 1px solid #ccc; vertical-align: top; overflow-wrap: normal; }}
th {{ font-size: 0.75rem; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; min-width: 8rem; position: sticky; left: 0; background: #fff;
  border-right: 1px solid #ccc; }}
@media (max-width: 40rem) {{ nav {{ max-height: 8rem; overflow-y: auto; }}
  table {{ width: max-content; font-size: 0.8rem; }} th, td {{ max-width: 7rem; }}
  th:first-child, td:first-child {{ min-width: 5rem; max-width: 7.5rem; }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
# Inline patterns of Markdown that are switched off, so that a name can never become HTML, a link or a picture.
NOT_OURS = "html link image_link reference image_reference short_reference short_image_ref autolink automail".split()


def html_page(text: str, pictures: dict[str, bytes]) -> str:
    """The Markdown report as one HTML page, which contains `pictures` ({name: PNG}) and needs no other file.

    Names of models and texts are shown literally, whatever HTML or links they contain.
    """
    converter = markdown.Markdown(extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2-2"}})
    converter.preprocessors.deregister("html_block")
    for pattern in NOT_OURS:
        converter.inlinePatterns.deregister(pattern)
    body = converter.convert(text)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    body = body.replace(" ± ", "&nbsp;±&nbsp;").replace("× ", "×&nbsp;")  # one number, in one line
    body = re.sub(r"(\de-)(\d)", r"\1&#8288;\2", body)  # a word joiner, against a line break after the hyphen of 1e-05

    def figure_of(match: re.Match) -> str:
        name, caption = match["name"], match["caption"]
        if name not in pictures:
            return match[0]
        source = f"data:image/png;base64,{base64.b64encode(pictures[name]).decode()}"
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        return f'<figure><img alt="{match["alt"]}" src="{source}">{below}</figure>'

    image = r'<p>!\[(?P<alt>[^"<]*)\]\((?P<name>[^)]*)\)</p>(\s*<p><em>(?P<caption>.*?)</em></p>)?'
    body = re.sub(image, figure_of, body)
    contents = f'<nav aria-label="Contents">{converter.toc}</nav>' if converter.toc_tokens else ""
    body = body.replace("</h1>", f"</h1>\n{contents}", 1)
    return PAGE.format(title=html.escape(text.partition("\n")[0].lstrip("# ")), body=body)
