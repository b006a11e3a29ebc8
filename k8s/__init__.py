"""Kubernetes: rendering, submitting and watching jobs."""
