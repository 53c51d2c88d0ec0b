"""Text to rows: sources, tokenizer, packing and the row stream. `data.open.open_data` is the way in."""
