/* Sends files to the session's folder on the server: one request a file, with progress, to be cancelled at any time. */

const hidden = (path) => path.split("/").some((part) => part.startsWith(".")); // .DS_Store and the like

/* The files of a drop, those inside folders included: pairs of the path inside the drop, and the file. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files].map((file) => [file.name, file]);
  const files = [];
  for (const entry of entries) await collect(entry, files);
  return files;
}

async function collect(entry, files) {
  if (entry.isFile) {
    files.push([entry.fullPath.slice(1), await new Promise((resolve, reject) => entry.file(resolve, reject))]);
    return;
  }
  const reader = entry.createReader();
  for (;;) { // readEntries gives a part at a time
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) return;
    for (const child of part) await collect(child, files);
  }
}

/* chosen: pairs of a path and a file. progress(fraction) is called on the way; signal is an AbortSignal. Throws an
   Error whose message is for the user, or an AbortError. */
export async function upload(chosen, url, limit, progress, signal) {
  const files = chosen.filter(([path]) => !path.includes("/") || !hidden(path));
  const total = files.reduce((sum, [, file]) => sum + file.size, 0);
  if (!total) throw new Error("There is nothing to read: what was chosen is empty.");
  if (total > limit) {
    const gigabytes = (bytes) => (bytes / 1e9).toFixed(bytes < 1e8 ? 3 : 1);
    throw new Error(`Too large: ${gigabytes(total)} GB, at most ${gigabytes(limit)} GB can be opened.`);
  }
  let sent = 0;
  for (const [path, file] of files) {
    signal.throwIfAborted();
    await send(file, `${url}?name=${encodeURIComponent(path)}`, (loaded) => progress((sent + loaded) / total), signal);
    sent += file.size;
  }
}

function send(file, url, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch can't tell how much has been sent
    const abort = () => request.abort();
    request.upload.onprogress = (event) => progress(event.loaded);
    request.onload = () => (request.status === 204 ? resolve() : reject(new Error(request.responseText)));
    request.onerror = () => reject(new Error("The upload broke off. Is the app still running? Try again."));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    request.onloadend = () => signal.removeEventListener("abort", abort);
    signal.addEventListener("abort", abort);
    request.open("PUT", url);
    request.send(file);
  });
}
