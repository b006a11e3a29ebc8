"""Downstream heads: from tokens to what is asked of an image or a pair; the lightest published design that does the job."""
