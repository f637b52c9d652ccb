package compose

import (
	"github.com/cloudos-io/cloudos/internal/compose/display"
)

// keys are what can be typed while an up is attached.
type keys struct{ detach chan struct{} }

// menu listens to the keyboard; without a terminal there is none.
func (a *app) menu(*display.Logs) *keys { return &keys{} }

func (k *keys) close() {}
