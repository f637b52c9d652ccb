// Command watch prints what inotify tells of the paths given.
package main

import (
	"fmt"
	"os"

	"github.com/fsnotify/fsnotify"
)

func main() {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		panic(err)
	}
	for _, p := range os.Args[1:] {
		if err := w.Add(p); err != nil {
			panic(err)
		}
	}
	fmt.Println("watching")
	for e := range w.Events {
		fmt.Println(e.Op, e.Name)
	}
}
