"""Grafana dashboards as code, and the JSON that they become."""
