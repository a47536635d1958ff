"""The contact sheet: one self-contained page with the images of a run, or of a folder of latents, and their latents."""
