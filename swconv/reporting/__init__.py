"""Tables and figures, made from metrics files and from what the papers print. Nothing here imports torch."""
