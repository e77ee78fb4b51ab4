"""Commands that show a bundle or pass it on."""
