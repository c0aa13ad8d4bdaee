// Uploads to a server that denies them. Arguments: the client (http, fetch), the URL, the key or nothing, bytes, times.
// Prints the status of each response, and the one that its body names.
import http from 'node:http';

const [client, url, key, bytes, times] = process.argv.slice(2);
const headers = { 'content-type': 'application/octet-stream', ...(key && { 'x-api-key': key }) };
const body = Buffer.alloc(Number(bytes), 'x');

function throughHttp() {
  return new Promise((resolve, reject) => {
    const request = http.request(url, { method: 'POST', headers }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (part) => (text += part));
      response.on('end', () => resolve([response.statusCode, text]));
      response.on('error', reject);
    });
    request.on('error', reject);
    request.end(body);
  });
}

async function throughFetch() {
  const response = await fetch(url, { method: 'POST', headers, body });
  return [response.status, await response.text()];
}

for (let time = 0; time < Number(times); time++) {
  try {
    const [status, text] = await (client === 'http' ? throughHttp() : throughFetch());
    console.log(status, JSON.parse(text).status);
  } catch (error) {
    console.log('failed:', error.cause?.code ?? error.code ?? error.message);
  }
}
