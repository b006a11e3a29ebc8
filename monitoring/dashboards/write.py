"""Write the dashboards' JSON beside their code, for Grafana to import.

.venv/bin/python -m monitoring.dashboards.write
"""

from pathlib import Path

from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.charts import to_json

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(to_json(board))
