"""A run on a cluster: manifests from a run config and a cluster config, the entrypoint of a pod, and examples as plain YAML."""
