package osinit

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/seal"
)

func TestSealedPCRs(t *testing.T) {
	for _, x := range []struct {
		boot string
		pcrs []int
		want []int
	}{{"", nil, []int{4, 7, 8, 9}}, {"unified", nil, []int{7, 11}}, {"unified", []int{14, 7}, []int{7, 14}}} {
		m := newMachine("test")
		m.cmdline = map[string]string{"boot": x.boot}
		if got := m.sealedPCRs(config.Encryption{PCRs: x.pcrs}); !slices.Equal(got, x.want) {
			t.Errorf("%q: %v, not %v", x.boot, got, x.want)
		}
	}
}

func TestMeasured(t *testing.T) {
	full, none := bytes.Repeat([]byte{1}, 32), make([]byte, 32)
	if err := measured(&seal.Sealed{PCRs: []int{7, 9}, Values: [][]byte{full, full}}); err != nil {
		t.Error(err)
	}
	if err := measured(&seal.Sealed{PCRs: []int{7, 9}, Values: [][]byte{full, none}}); err == nil || !strings.Contains(err.Error(), "register 9") {
		t.Errorf("a register that is empty: %v", err)
	}
}

func TestRecoveryKey(t *testing.T) {
	a, b := newRecoveryKey(), newRecoveryKey()
	if a == b || len(strings.ReplaceAll(a, "-", "")) != 52 || strings.Count(a, "-") != 12 {
		t.Errorf("%d and %d characters", len(a), len(b))
	}
}
