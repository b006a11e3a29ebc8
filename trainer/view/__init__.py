"""Pages of HTML that open anywhere: `page` of a run, with `curves`, and `clip` of one clip; templates lie beside them."""
