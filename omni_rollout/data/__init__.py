"""From prompts to requests: files of prompts, fixed widths, SDE windows, seeds."""
