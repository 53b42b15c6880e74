"""Models of other libraries; each module is imported only when it is used."""
