// A consumer of the generated types: it reads the examples of the schema, and writes each again.
package main

import (
	"encoding/json"
	"fmt"
	"os"
)

func main() {
	for _, line := range os.Args[1:] {
		var outcome struct {
			Status string `json:"status"`
		}
		check(json.Unmarshal([]byte(line), &outcome))
		if outcome.Status == "success" {
			success, err := UnmarshalSuccessMessage([]byte(line))
			check(err)
			fmt.Println(success.LatentFilePath, success.LatentShape[1], success.Metadata.LatentSha256, success.Metadata.Timestamp.Year())
		} else {
			failure, err := UnmarshalErrorMessage([]byte(line))
			check(err)
			fmt.Println(failure.ErrorCode, failure.ErrorMessage)
		}
	}
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
