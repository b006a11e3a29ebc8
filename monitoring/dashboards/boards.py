"""The four dashboards, each in a file of its own beside this one.

Left to whom: how a chart becomes a panel is `charts`; expressions that alerts use as well are recording rules (`monitoring/rules`).
"""

from monitoring.dashboards.checkpoints import CHECKPOINTS
from monitoring.dashboards.data import DATA
from monitoring.dashboards.fleet import FLEET
from monitoring.dashboards.run import RUN

BOARDS = (RUN, FLEET, DATA, CHECKPOINTS)
