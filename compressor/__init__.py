"""Stage 1: from streams to tokens; also the layers and the training loop that both stages share."""
