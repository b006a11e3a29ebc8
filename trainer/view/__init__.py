"""A run as one page of HTML that opens anywhere: `curves` draws, `page` collects and fills in `page.html`."""
