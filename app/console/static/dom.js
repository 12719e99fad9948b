/** Small helpers around the DOM; nothing here makes HTML of strings, so what workers and users say stays text. */

const SVG = "http://www.w3.org/2000/svg";

/** An element. Properties: `class`, `data` (an object), `on` (listeners), attributes, and DOM properties as they are. */
export function h(name, props = {}, ...children) {
  return fill(document.createElement(name), props, children);
}

export function svg(name, props = {}, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

function fill(element, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") element.setAttribute("class", value);
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set text only where it differs: 200 workers change once a second. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function attr(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

/** A share of the whole, for bars; the policy of the page forbids style attributes, not this. */
export function share(node, name, value) {
  const text = `${(Math.max(0, Math.min(1, value || 0)) * 100).toFixed(1)}%`;
  if (node.style.getPropertyValue(name) !== text) node.style.setProperty(name, text);
}

/** Make the children of `parent` those of `wanted`, in that order, moving as few as need be. */
export function arrange(parent, wanted) {
  let at = parent.firstChild;
  for (const node of wanted) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}
