"""Words of the built-in catalogue: departments, topics, styles and tiers, and how each shows in an item."""

from __future__ import annotations

DEPARTMENTS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "Kitchen": {
        "Coffee": (("Pour-Over Kettle", "Moka Pot", "Burr Grinder", "Espresso Cup", "Milk Frother"), "slow mornings"),
        "Baking": (("Bundt Tin", "Rolling Pin", "Proofing Basket", "Dough Scraper", "Pie Dish"), "weekend loaves"),
        "Cutlery": (("Chef Knife", "Paring Knife", "Whetstone", "Steak Set", "Carving Fork"), "clean, even cuts"),
        "Cookware": (("Skillet", "Dutch Oven", "Saucepan", "Wok", "Stockpot"), "one-pot suppers"),
        "Pantry": (("Preserving Jar", "Spice Rack", "Bread Bin", "Oil Cruet", "Flour Canister"), "a tidy larder"),
        "Glassware": (("Tumbler", "Carafe", "Champagne Coupe", "Decanter", "Water Goblet"), "festive toasts"),
    },
    "Outdoors": {
        "Camping": (("Lantern", "Sleeping Pad", "Mess Kit", "Tarp", "Fire Striker"), "nights under canvas"),
        "Climbing": (("Chalk Bag", "Harness", "Quickdraw", "Belay Glove", "Rope Bucket"), "granite and limestone"),
        "Fishing": (("Fly Reel", "Landing Net", "Tackle Box", "Float Set", "Creel"), "quiet river banks"),
        "Gardening": (("Trowel", "Watering Can", "Seed Dibber", "Secateurs", "Kneeling Mat"), "spring borders"),
        "Cycling": (("Pannier", "Handlebar Bell", "Tire Pump", "Saddle", "Bottle Cage"), "miles of back road"),
        "Running": (("Hip Belt", "Headband", "Reflective Vest", "Soft Flask", "Gaiters"), "early tempo sessions"),
    },
    "Studio": {
        "Painting": (("Sable Brush", "Palette", "Easel", "Gouache Set", "Canvas Panel"), "oils and watercolor"),
        "Photography": (("Lens Pouch", "Tripod", "Camera Strap", "Light Meter", "Film Case"), "golden-hour frames"),
        "Sewing": (("Thread Box", "Pin Cushion", "Fabric Shears", "Thimble", "Bobbin Case"), "hems and quilts"),
        "Pottery": (("Loop Tool", "Banding Wheel", "Glaze Pot", "Clay Cutter", "Rib Set"), "wheel-thrown bowls"),
        "Guitar": (("Capo", "Plectrum Tin", "Guitar Stand", "String Winder", "Tremolo Pedal"), "fingerstyle and blues"),
        "Calligraphy": (("Dip Pen", "Ink Bottle", "Nib Holder", "Blotter", "Guard Sheet"), "letters by hand"),
    },
    "Home": {
        "Lighting": (("Desk Lamp", "Pendant Shade", "Wall Sconce", "Night Light", "Floor Lamp"), "warm evenings"),
        "Rugs": (("Hall Runner", "Floor Rug", "Door Mat", "Bath Mat", "Hearth Rug"), "soft steps"),
        "Clocks": (("Wall Clock", "Alarm Clock", "Mantel Clock", "Metronome", "Barometer"), "keeping good time"),
        "Shelving": (("Wall Shelf", "Book End", "Plant Stand", "Magazine Rack", "Coat Hook"), "small apartments"),
        "Candles": (("Candlestick", "Tea Light Holder", "Pillar", "Wick Trimmer", "Snuffer"), "dinners after dark"),
        "Table Linen": (("Napkin Set", "Tea Towel", "Placemat", "Tablecloth", "Apron"), "long family lunches"),
    },
}
"""Department to topic to its nouns and what they are good for."""

STYLES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, tuple[int, int, int]]] = {
    "Nordic": (
        ("Birch", "Pale Ash", "Frosted", "Wool-Trimmed", "Fjord"),
        ("Nordlys & Co", "Sundholm", "Lumi Works", "Fjordby"),
        "light wood and calm northern lines",
        (168, 200, 216),
    ),
    "Industrial": (
        ("Gunmetal", "Riveted", "Raw Steel", "Factory", "Blackened"),
        ("Foundry Nine", "Ironmonger Ltd", "Gauge & Bolt", "Smelter Row"),
        "bare metal and honest welds",
        (82, 84, 92),
    ),
    "Botanical": (
        ("Fern", "Leaf-Print", "Moss Green", "Wildflower", "Ivy"),
        ("Greenhouse Lane", "Petal & Stem", "Orchard House", "Verdant"),
        "pressed leaves and garden greens",
        (96, 156, 84),
    ),
    "Retro": (
        ("Chrome-Edged", "Diner", "Mustard", "Sixties", "Checkerboard"),
        ("Jukebox Supply", "Route Nine", "Polka & Sons", "Astro Home"),
        "bold mid-century color",
        (226, 150, 46),
    ),
    "Mediterranean": (
        ("Terracotta", "Azulejo", "Olive-Wood", "Sun-Bleached", "Cobalt"),
        ("Casa Marina", "Porto Alto", "Limoncello Bros", "Aegean Craft"),
        "tile patterns and sunlit clay",
        (196, 92, 66),
    ),
}
"""Style to its adjectives, its brands, how a description puts it, and the color of its pictures (RGB)."""

TIERS: tuple[tuple[str, float], ...] = (
    ("An entry-level choice that keeps the price low", 1.0),
    ("A dependable mid-range piece for everyday use", 2.5),
    ("A premium edition, finished by hand and built to last", 6.25),
)
"""How a description puts the tier, and what it multiplies the price by."""

REVIEWS: dict[int, tuple[str, ...]] = {
    5: ("Exactly my taste, could not be happier", "Lovely, I would buy it again"),
    4: ("Very good, just what I was after", "Nice piece, well made"),
    3: ("It is fine, but not quite my style", "Does the job, the look is not for me"),
    2: ("Not what I usually go for", "I expected something else"),
}
"""Rating to opinions."""
