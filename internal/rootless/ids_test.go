package rootless

import (
	"os"
	"reflect"
	"testing"
)

func TestParseSubordinate(t *testing.T) {
	text := "alice:100000:65536\n# bob:1:1\nbob:200000:65536\n1000:300000:10\nalice:x:1\nalice:5:0\nalice:1:2:3\n"
	got := pack(parseSubordinate(text, "alice", "1000"))
	want := []idRange{{1, 100000, 65536}, {65537, 300000, 10}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := parseSubordinate(text, "carol", "7"); got != nil {
		t.Errorf("ranges of nobody: %v", got)
	}
}

func TestStartTime(t *testing.T) {
	if startTime(os.Getpid()) == "" || startTime(os.Getpid()) != startTime(os.Getpid()) {
		t.Error("no start time of this process")
	}
	if startTime(0) != "" {
		t.Error("a start time of no process")
	}
}
