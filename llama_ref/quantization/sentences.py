"""Some sentences in the languages that Llama 3 was trained to answer in, and a few more, for calibration to read."""

SENTENCES = """\
어제 저녁에는 비가 많이 왔다. 우리는 우산이 없어서 역 앞 서점에서 한참을 기다렸고, 그동안 나는 오래된 지도책을 한 권 \
샀다. 책방 주인은 여든이 넘은 분인데, 젊었을 때 배를 타고 여러 나라를 다녔다고 한다. "바다에서는 시간이 다르게 흘러요." \
그가 웃으며 말했다. 다음 날 아침에 회의가 있어서 일찍 일어나야 했지만, 이야기가 재미있어서 자리를 뜰 수 없었다. 이 \
기능을 사용하려면 먼저 설정 파일을 열고, 필요한 값을 입력한 뒤에 프로그램을 다시 시작하십시오. 오류가 나면 메시지를 \
그대로 적어서 보내 주시면 도움을 드리겠습니다. 한국의 수도는 서울이며, 인구는 약 940만 명이다.

Gestern hat es den ganzen Abend geregnet, und wir mussten lange unter dem Dach des Bahnhofs warten. Meine Schwester \
erzählte von ihrer neuen Stelle: Sie prüft Brücken, bevor sie für den Verkehr freigegeben werden. Danach gingen wir \
essen.

Le marché ouvre à sept heures, mais les meilleurs fromages partent vite. J'y vais souvent avec mon voisin, qui connaît \
tous les producteurs de la vallée et leur demande toujours des nouvelles de leurs enfants.

La biblioteca cierra los domingos, así que devolví los libros el sábado por la tarde. La encargada me recomendó una \
novela sobre un faro abandonado; la empecé esa misma noche y no pude dormir hasta terminarla.

Il treno per Bologna parte dal binario quattro con dieci minuti di ritardo. Nel frattempo abbiamo bevuto un caffè e \
parlato del concerto di ieri, che era stato più lungo del previsto.

A reunião foi adiada para a próxima semana porque metade da equipe está viajando. Enquanto isso, vamos revisar os \
números do relatório e corrigir os gráficos que ainda mostram os valores do ano passado.

कल शाम को बहुत तेज़ बारिश हुई, इसलिए हम बाज़ार नहीं जा सके। माँ ने घर पर ही खाना बनाया और दादाजी ने हमें अपने गाँव की \
पुरानी कहानियाँ सुनाईं।

เมื่อเช้านี้ฝนตกหนัก รถจึงติดตั้งแต่หน้าบ้านจนถึงที่ทำงาน ฉันเลยเดินไปขึ้นรถไฟฟ้าแทนและแวะซื้อกาแฟระหว่างทาง

昨天下午我们去爬山,天气很好,山顶可以看到整个城市。下山以后大家都饿了,就在路边的小店吃了面条,老板还送了我们一盘水果。

週末は友達と海まで自転車で行きました。途中で道に迷いましたが、親切な漁師さんが近道を教えてくれて、夕方には着くことができ\
ました。

Вчера мы весь день чинили старую лодку, а вечером сидели у костра и слушали, как дед рассказывает о своих путешествиях \
по северу.

وصلنا إلى القرية قبل غروب الشمس بقليل، فاستقبلنا أهلها بالشاي والتمر، وجلسنا نتحدث عن موسم الزيتون حتى ساعة متأخرة من \
الليل.
"""
