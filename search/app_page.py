"""The web page itself, in Gradio: controls, events, and the little JavaScript that Gradio's components need."""

from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from .app_service import LONGEST_PAGE, MISTAKES, SearchService, in_words
from .app_views import (
    Query,
    parse_link,
    parse_number,
    parse_query,
    show_cards,
    show_details,
    show_status,
    show_timeline,
    to_json,
    to_link,
)

# The value of this part is the key of the uploaded picture. Gradio's own upload would leave files on the disk.
_PICTURE = """<div class="eccl"><label>Picture of the person (optional)
<input type="file" accept="image/*"></label> ${value ? '<button type="button">Remove the picture</button>' : ''}
<span role="status"></span></div>"""

_ON_PICTURE = """
const say = words => setTimeout(() => { element.querySelector('[role=status]').textContent = words; }, 60);
element.addEventListener('change', async event => {
  const file = event.target.files && event.target.files[0];
  if (!file) return;
  say('The picture is being sent.');
  try {
    const answer = await fetch('api/picture', {method: 'POST', body: file});
    const content = await answer.json();
    props.value = answer.ok ? content.picture : '';
    say(answer.ok ? 'The picture takes part in the search.' : 'Not done: ' + content.error);
    if (!answer.ok) event.target.value = '';
  } catch (error) {
    props.value = '';
    say('Not done: the picture could not be sent.');
  }
});
element.addEventListener('click', event => {
  if (event.target.tagName !== 'BUTTON') return;
  element.querySelector('input').value = '';
  props.value = '';
  say('The picture is removed.');
});
"""

_ON_RESULTS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', {action: button.dataset.action, id: button.dataset.id});
});
"""

_ON_DETAILS = f"""{_ON_RESULTS}
element.addEventListener('change', () => {{
  const picture = element.querySelector('img[data-heat]');
  const boxes = [...element.querySelectorAll('input[name=word]:checked')];
  const words = boxes.map(box => box.dataset.word).join(' ');
  picture.src = picture.dataset.heat + (boxes.length ? '&words=' + boxes.map(box => box.value).join(',') : '');
  picture.alt = 'Heat map of ' + (words || 'the whole sentence');
}});
watch('value', () => {{
  element.querySelectorAll('input').forEach(box => {{ box.checked = false; }});
  const heading = element.querySelector('h2');
  if (heading) {{
    heading.focus({{preventScroll: true}});
    heading.scrollIntoView({{block: 'start'}});
  }}
}});
"""


def build_page(service: SearchService) -> gr.Blocks:
    """Builds the page over a service."""
    gallery = service.gallery
    with gr.Blocks(title="Person search", analytics_enabled=False) as page:
        gr.Markdown(
            "# Person search\nA high score means that a picture looks like the sentence, and nothing more: "
            "it does not tell who somebody is."
        )
        with gr.Row(equal_height=True):
            # No limit of length here: a browser would cut the text without a word.
            sentence = gr.Textbox(
                label="Describe the person",
                placeholder="a woman in a red coat with a black backpack",
                max_lines=1,
                scale=8,
                elem_id="sentence",
            )
            button = gr.Button("Search", variant="primary", min_width=100, elem_id="search")
        picture = gr.HTML("", html_template=_PICTURE, js_on_load=_ON_PICTURE, elem_id="picture")
        with gr.Accordion("Filters and order", open=False, elem_id="filters"):
            negative = gr.Textbox(label="Not like this", placeholder="a backpack", max_lines=1, elem_id="negative")
            cameras = gr.Dropdown(
                gallery.cameras, value=[], multiselect=True, label="Cameras (none: all)", elem_id="cameras"
            )
            with gr.Row():
                start = gr.Textbox(label="From (UTC)", placeholder="2026-05-01 08:00", max_lines=1, elem_id="start")
                stop = gr.Textbox(label="Until (UTC)", placeholder="2026-05-01 18:00", max_lines=1, elem_id="stop")
            with gr.Row(visible=bool(gallery.columns)):
                column = gr.Dropdown(["", *gallery.columns], value="", label="Column", elem_id="column")
                value = gr.Textbox(label="Value of the column", max_lines=1, elem_id="value")
            with gr.Row():
                order = gr.Radio(["score", "time"], value="score", label="Order", elem_id="order")
                grouped = gr.Checkbox(label="Only the best picture of each tracklet", elem_id="grouped")
            with gr.Row():
                top_k = gr.Slider(1, LONGEST_PAGE, 20, step=1, label="Results on a page", elem_id="top_k")
                min_score = gr.Textbox(label="Lowest score", placeholder="0.25", max_lines=1, elem_id="min_score")
        # A screen reader tells each change of it.
        status = gr.HTML("", html_template='<p class="eccl" role="status">${value}</p>', elem_id="status")
        parts: dict[str, Any] = {"elem_classes": "eccl", "apply_default_css": False}
        details = gr.HTML("", js_on_load=_ON_DETAILS, elem_id="details", **parts)
        results = gr.HTML("", js_on_load=_ON_RESULTS, elem_id="results", **parts)
        timeline = gr.HTML("", elem_id="timeline", **parts)
        # The query of the results on the page, as a link.
        shown = gr.State("")
        controls = [sentence, negative, cameras, start, stop, column, value, order, grouped, min_score, top_k]
        answers = [status, results, timeline, details, shown]

    def refuse(error: Exception) -> list[Any]:
        """Says in words what is wrong; the old results stay."""
        words = escape(in_words(error)[1])
        gr.Warning(words, title="Not done")
        return [f"Not done: {words}", *[gr.skip()] * (len(answers) - 1)]

    async def show(query: Query, client: str) -> list[Any]:
        found, has_more, counted = await service.serve(client, service.search_page, query, client)
        return [
            show_status(query, len(found), has_more, gallery.threshold),
            show_cards(found, query, has_more),
            gr.skip() if counted is None else show_timeline(counted),
            "",
            to_link(query, keep_picture=True),
        ]

    async def ask(request: gr.Request, picture: str, *given: Any) -> list[Any]:
        try:
            return await show(_read_controls(picture, *given), request.state.client)
        except MISTAKES as error:
            return refuse(error)

    async def act(shown: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Answers a button of the results or of the details."""
        try:
            query, client = parse_link(shown), request.state.client
            action, id = (str(event._data.get(name, "")) for name in ("action", "id"))
            if action in ("explain", "close"):
                return [gr.skip(), gr.skip(), gr.skip(), await explain(id, query, client) if id else "", gr.skip()]
            return await show(_apply(query, action, id), client)
        except MISTAKES as error:
            return refuse(error)

    async def explain(id: str, query: Query, client: str) -> str:
        match, words = await service.serve(client, service.describe, id, query.sentence, client)
        return show_details(match, query.sentence, words)

    async def restore(request: gr.Request) -> list[Any]:
        """Shows the search of a link."""
        nothing = [gr.skip()] * (len(controls) + len(answers))
        try:
            query = parse_link(str(request.query_params))
        except MISTAKES as error:
            return [*nothing[: len(controls)], *refuse(error)]
        if query.is_empty:
            return nothing
        try:
            return [*_fill_controls(query), *await show(query, request.state.client)]
        except MISTAKES as error:
            return [*_fill_controls(query), *refuse(error)]

    async def search(query: dict, request: gr.Request) -> dict:
        """Searches with the fields of POST /api/search, and answers like it."""
        try:
            client = request.state.client
            found = await service.serve(client, service.search, parse_query(query), client)
        except MISTAKES as error:
            raise gr.Error(in_words(error)[1], print_exception=False) from None
        return {"matches": [to_json(match) for match in found]}

    with page:
        events: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", "outputs": answers}
        gr.on([button.click, sentence.submit, negative.submit], ask, [picture, *controls], **events)
        results.click(act, shown, **events)
        details.click(act, shown, **events)
        page.load(restore, None, **(events | {"outputs": [*controls, *answers]}))
        gr.api(search, api_name="search")
    return page


def _read_controls(picture: str, *given: Any) -> Query:
    """Makes a query of the values of the controls, in their order on the page."""
    sentence, negative, cameras, start, stop, column, value, order, grouped, min_score, top_k = given
    if value and not column:
        raise ValueError("a value of a column is given without a column: choose the column")
    return parse_query(
        {
            "sentence": sentence,
            "negative": negative,
            "picture": picture,
            "cameras": cameras,
            "start": start,
            "stop": stop,
            "columns": {column: value or ""} if column else {},
            "order": order,
            "group_by": "tracklet" if grouped else "",
            "min_score": parse_number("the lowest score", min_score) if (min_score or "").strip() else None,
            "top_k": top_k,
        }
    )


def _fill_controls(query: Query) -> list[Any]:
    """Returns the values of the controls for a query; the reverse of [`_read_controls`]."""
    column, value = next(iter(query.columns.items()), ("", ""))
    return [
        query.sentence,
        query.negative,
        list(query.cameras),
        query.start,
        query.stop,
        column,
        str(value),
        query.order,
        bool(query.group_by),
        "" if query.min_score is None else str(query.min_score),
        query.top_k,
    ]


def _apply(query: Query, action: str, id: str) -> Query:
    """Returns the query after a button: another page, or a result that is, or is not, like the person."""
    if action in ("back", "on"):
        step = query.top_k if action == "on" else -query.top_k
        return replace(query, offset=max(0, query.offset + step))
    if action not in ("like", "unlike") or not id:
        raise ValueError(f"there is no button {action[:80]!r}")
    chosen = {"like": list(query.like), "unlike": list(query.unlike)}
    was_chosen = id in chosen[action]
    for ids in chosen.values():
        if id in ids:
            ids.remove(id)
    if not was_chosen:
        chosen[action].append(id)
    # It checks the id, too.
    return parse_query({**vars(query), **chosen, "offset": 0})


__all__ = ["build_page"]
