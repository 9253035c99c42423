"""Text in many scripts and shapes, for properties that hold for any input."""

PROSE = {
    "english": "The ferry leaves at seven; we'll be late if you don't hurry, and it's 1,234.56 km to Ullapool!",
    "korean": "비가 그치자 골목 끝 빵집에서 갓 구운 냄새가 났다. 뷁 같은 드문 글자도, 옛글 ᄒᆞᆫ글도 있다.",
    "chinese": "昨夜下了一场大雪,窗外的竹子被压弯了腰。繁體字與生僻字「龘」「𠮷」也要能寫。",
    "japanese": "電車が遅れたので、駅前の喫茶店でコーヒーを飲みながら待ちました。ハンカクも㍿も。",
    "arabic": "وصلَ القطارُ متأخرًا ساعتين، فشربنا الشاي في المحطة. الرقم ٣٫١٤ تقريبًا.",
    "hebrew": "הרכבת איחרה, אז שָׁתִינוּ תֵּה בתחנה.",
    "thai": "เมื่อวานฝนตกหนักมาก น้ำจึงท่วมถนนหน้าบ้าน ราคา ๑๒๓ บาท",
    "hindi": "कल रात बहुत बारिश हुई, इसलिए आज स्कूल बंद है। क्ष त्र ज्ञ",
    "russian": "Поезд опоздал на два часа, и мы пили чай на вокзале; ёжик спал.",
    "greek": "Το τρένο άργησε δύο ώρες· ήπιαμε καφέ στον σταθμό.",
    "vietnamese": "Chuyến tàu trễ hai tiếng nên chúng tôi ngồi uống cà phê ở ga.",
    "turkish": "İstanbul'da ılık bir akşamdı; DON'T I'LL WE'RE, \u017f ve \u212a işaretleri.",
    "combining": "Zwo\u0308lf e\u0301te\u0301s nai\u0308fs — x̧̡̨͖̗̰ y\u0336",
    "emoji": "👍🏽 family 👨‍👩‍👧‍👦, flags 🇰🇷🇫🇷, astronaut 👩🏿‍🚀, heart ❤️‍🔥, keycap 3️⃣ 🫠🪿",
    "mathematics": "∀ε>0 ∃δ: |x−a|<δ ⇒ |𝑓(𝑥)−𝐿|<ε; ½ + ⅓ = ⅚, Ⅻ, ²³, ٤٥٦, 一二三",
}

CODE = {
    "python": 'def area(r: float) -> float:\n\t"""A circle."""\n    return 3.14 * r**2  # m\n\n\nprint(f"{area(2):>9.3f}")\n',
    "c": "for (size_t i = 0; i < n; ++i) {\r\n  p[i] ^= 0xFFu >> (i & 7); /* flip */\r\n}\r\n",
    "json": '{"name": "café", "sizes": [1, 20, 300, 4000, 1e-9], "nested": {"ok": null}}',
    "html": "<p class='a'>1 &lt; 2</p>\n\n\n   <br/>",
}

ODD = {
    "empty": "",
    "space": " ",
    "blank_lines": "\n\n \n\t\n\r\n\r  end",
    "indented": "        eight\n      six\n\n\n\n    four   ",
    "unicode_spaces": "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\u200bh\u1680i\u001cj\u001fk",
    "nul_and_controls": "a\0b\0\0c\x01\x02\x7f\x1b[31mred",
    "lone_surrogates": "high \ud83d low \udc00 end",
    "surrogate_pair": "pair \ud83d\ude00 whole \U0001f600",
    "noncharacters": "\ufffe \uffff \ufffd \U0010ffff \U000e0041",
    "special_text": "<|begin_of_text|><|eot_id|> <|eom_id|>\n<|python_tag|><|reserved_special_token_245|><|start_header_id|>",
    "half_special_text": "<|eot_id| ><|eot_i<|eot_id|>d|> |eot_id|> <|EOT_ID|>",
    "digits": "1 12 123 1234 12345 1234567890 0001",
    "apostrophes": "it's IT'S DON'TS I'MA 'TEXas I'Ve they'LL ''s 're 'D ’s it'\u017f",
}

SHORT = PROSE | CODE | ODD
# Text that UTF-8 can represent.
WHOLE = {name: text for name, text in SHORT.items() if "surrogate" not in name}

LONG = {
    "long_letters": "a" * 25_001,
    "long_hangul": "가나다라마" * 11_000,
    "long_spaces": "x" + " " * 60_000 + "y",
    "long_mixed_whitespace": " \t\n\r\u3000" * 15_000 + "end",
    "long_punctuation": "start " + "=-" * 40_000,
    "long_digits": "1234567" * 10_000,
    "long_emoji": "👨‍👩‍👧‍👦" * 8_000,
    "runs_at_the_limit": ("b" * 25_000 + " " * 25_000) * 2 + "c" * 25_001 + "\n" * 25_001,
    "long_special_text": "<|eot_id|>" * 6_000,
    "beyond_one_piece": "The tide comes in twice a day. " * 14_000,
    "run_across_pieces": "w " * 190_000 + "z" * 50_000 + " tail",
    "surrogate_pair_across_pieces": "p" + " q" * 199_999 + "\ud83d\ude00",
    "multibyte_beyond_one_piece": "밀물은 하루에 두 번 든다. " * 27_000,
}

CORPUS = SHORT | LONG
