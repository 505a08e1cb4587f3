"""Units of measurement that an answer may have: dimension and factor to the dimension's base."""

from __future__ import annotations

CURRENCIES = {"$": "usd", "€": "eur", "£": "gbp", "¥": "yen"}
SCALES = {
    "hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12,
    "dozen": 12.0, "k": 1e3,
}  # fmt: skip
_OF = {
    "length": {
        "mm": 1e-3, "cm": 1e-2, "dm": 0.1, "m": 1.0, "km": 1e3, "meter": 1.0, "meters": 1.0,
        "metre": 1.0, "metres": 1.0, "centimeter": 1e-2, "centimeters": 1e-2, "centimetres": 1e-2,
        "millimeters": 1e-3, "millimetres": 1e-3, "kilometer": 1e3, "kilometers": 1e3,
        "kilometre": 1e3, "kilometres": 1e3, "inch": 0.0254, "inches": 0.0254, "foot": 0.3048,
        "feet": 0.3048, "ft": 0.3048, "yard": 0.9144, "yards": 0.9144, "mile": 1609.344,
        "miles": 1609.344,
    },
    "mass": {
        "mg": 1e-6, "g": 1e-3, "kg": 1.0, "gram": 1e-3, "grams": 1e-3, "kilogram": 1.0,
        "kilograms": 1.0, "ton": 1e3, "tons": 1e3, "tonnes": 1e3, "lb": 0.45359237,
        "lbs": 0.45359237, "pound": 0.45359237, "pounds": 0.45359237, "ounce": 0.028349523125,
        "ounces": 0.028349523125, "oz": 0.028349523125,
    },
    "time": {
        "ms": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "min": 60.0,
        "mins": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hr": 3600.0, "hrs": 3600.0,
        "hour": 3600.0, "hours": 3600.0, "day": 86400.0, "days": 86400.0, "week": 604800.0,
        "weeks": 604800.0, "month": 2629800.0, "months": 2629800.0, "year": 31557600.0,
        "years": 31557600.0,
    },
    "volume": {
        "ml": 1e-3, "mL": 1e-3, "cl": 1e-2, "l": 1.0, "L": 1.0, "liter": 1.0, "liters": 1.0,
        "litre": 1.0, "litres": 1.0,
    },
    "angle": {"degree": 1.0, "degrees": 1.0, "deg": 1.0, "rad": 57.29577951308232,
              "radians": 57.29577951308232},
    "celsius": {"celsius": 1.0, "C": 1.0},
    "fahrenheit": {"fahrenheit": 1.0, "F": 1.0},
    "usd": {"dollar": 1.0, "dollars": 1.0, "usd": 1.0, "USD": 1.0, "cent": 0.01, "cents": 0.01},
    "eur": {"euro": 1.0, "euros": 1.0, "EUR": 1.0, "eur": 1.0},
    "clock": {"am": 0.0, "pm": 12.0, "AM": 0.0, "PM": 12.0},
}  # fmt: skip
UNITS: dict[str, tuple[str, float]] = {
    word: (dimension, factor) for dimension, words in _OF.items() for word, factor in words.items()
}
