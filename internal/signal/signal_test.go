package signal

import "testing"

func TestParse(t *testing.T) {
	for s, want := range map[string]int{"9": 9, "KILL": 9, "sigterm": 15, "RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX-1": 63, "": 0, "0": 0, "65": 0, "RTMIN+31": 0, "RTMAX+1": 0, "SIGSIGKILL": 0} {
		got, err := Parse(s)
		if got != want || (err != nil) != (want == 0) {
			t.Errorf("%q: %d %v", s, got, err)
		}
	}
}
