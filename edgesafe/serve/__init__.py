"""`edgesafe serve`: the page for a browser on this machine, and the OpenAI API for programs."""
