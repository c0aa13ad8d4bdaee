// Uploads to a server that denies them. Arguments: the URL, the key or nothing, bytes, times. Prints the status of each
// response, and the one that its body names.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strconv"
)

func main() {
	url, key := os.Args[1], os.Args[2]
	size, _ := strconv.Atoi(os.Args[3])
	times, _ := strconv.Atoi(os.Args[4])
	body := bytes.Repeat([]byte("x"), size)
	for time := 0; time < times; time++ {
		status, named, err := upload(url, key, body)
		if err != nil {
			fmt.Println("failed:", err)
		} else {
			fmt.Println(status, named)
		}
	}
}

func upload(url, key string, body []byte) (status, named int, err error) {
	request, err := http.NewRequest("POST", url, bytes.NewReader(body))
	if err != nil {
		return 0, 0, err
	}
	request.Header.Set("Content-Type", "application/octet-stream")
	if key != "" {
		request.Header.Set("X-Api-Key", key)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, 0, err
	}
	defer response.Body.Close()
	var problem struct{ Status int }
	err = json.NewDecoder(response.Body).Decode(&problem)
	return response.StatusCode, problem.Status, err
}
