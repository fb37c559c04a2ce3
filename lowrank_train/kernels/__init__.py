"""Operations worth fusing: each one name, with its reference in plain torch."""
