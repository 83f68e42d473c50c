"""Let `dvc plots` work without a network; run by `make setup`.

The pages that DVC writes load Vega, which draws the plots, from a CDN. This writes a template of
such a page that holds Vega itself, and names it in `.dvc/config.local`; neither is kept in git.
"""

import subprocess
import sys
from pathlib import Path

from model.runtime.files import write_bytes

TEMPLATE = Path(".dvc/plots.html")
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8">{refresh_tag}<title>Plots</title>
<script>VEGA</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def write_template() -> None:
    """Write the template for the checkout in the current directory, and have DVC use it."""
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError:
        print("note: vl-convert-python is not installed; `dvc plots` needs a network", flush=True)
        return
    # What looks like the end of a script in the text of a program would be one in HTML.
    vega = javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    write_bytes(TEMPLATE, PAGE.replace("VEGA", vega).encode())
    command = [sys.executable, "-m", "dvc", "config", "--local", "plots.html_template"]
    subprocess.run([*command, TEMPLATE.name], check=True)


if __name__ == "__main__":
    write_template()
