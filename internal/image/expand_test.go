package image

import "testing"

func TestExpand(t *testing.T) {
	env := []string{"A=old", "A=one", "B=two words", "EMPTY=", `Q=a"b\c`}
	for in, want := range map[string]string{
		"plain":           "plain",
		"P=/x:$A":         "P=/x:one",
		"P=${A}b":         "P=oneb",
		"P=$A_":           "P=",
		"P=$B":            `P=two\ words`,
		`P="$B"`:          `P="two words"`,
		`P='$A'`:          `P='$A'`,
		`P=\$A`:           "P=$A",
		"P=${NONE:-dflt}": "P=dflt",
		"P=${A:-dflt}":    "P=one",
		"P=${EMPTY:-$A}":  "P=one",
		"P=${A:+yes}":     "P=yes",
		"P=${EMPTY:+yes}": "P=",
		"P=$NONE":         "P=",
		"P=$":             "P=$",
		"P=$$A":           "P=$one",
		"P=${":            "P=${",
		"P=${}":           "P=${}",
		"P=${A:?no}":      "P=${A:?no}",
		"P=$1":            "P=$1",
		`P="$Q"`:          `P="a\"b\\c"`,
		`P="it's $A"`:     `P="it's one"`,
	} {
		if got := Expand(in, env); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
