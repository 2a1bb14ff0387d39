def write_model_card(d, c):
    pass
